// Tile kernels for 3-bit codes.
#include "tile_launch.cuh"

namespace flute {

int tile_w3(FLUTE_TILE_ARGUMENTS) {
  return launch_tile_bits<3>(matrix, config, m, x, records, table, y, workspace, stream);
}

}  // namespace flute
