// Decode kernels for 2-bit codes.
#include "decode_launch.cuh"

namespace flute {

int decode_w2(FLUTE_DECODE_ARGUMENTS) {
  return launch_bits<2>(matrix, config, m, x, records, table, y, ahead, stream);
}

}  // namespace flute
