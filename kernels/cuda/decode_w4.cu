// Decode kernels for 4-bit codes.
#include "decode_launch.cuh"

namespace flute {

int decode_w4(FLUTE_DECODE_ARGUMENTS) {
  return launch_bits<4>(matrix, config, m, x, records, table, y, ahead, stream);
}

}  // namespace flute
