// Tile kernels for 4-bit codes.
#include "tile_launch.cuh"

namespace flute {

int tile_w4(FLUTE_TILE_ARGUMENTS) {
  return launch_tile_bits<4>(matrix, config, m, x, records, table, y, workspace, stream);
}

}  // namespace flute
