// Hopper kernels for 2-bit codes and more than a few rows of x.
#include "sm90_launch.cuh"

namespace flute {

int sm90_w2(FLUTE_SM90_ARGUMENTS) {
  return launch_sm90_bits<2>(matrix, config, m, x, records, table, y, workspace, ahead, stream);
}

}  // namespace flute
