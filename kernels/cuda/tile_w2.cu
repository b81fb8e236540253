// Tile kernels for 2-bit codes.
#include "tile_launch.cuh"

namespace flute {

int tile_w2(FLUTE_TILE_ARGUMENTS) {
  return launch_tile_bits<2>(matrix, config, m, x, records, table, y, workspace, stream);
}

}  // namespace flute
