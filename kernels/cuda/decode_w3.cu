// Decode kernels for 3-bit codes.
#include "decode_launch.cuh"

namespace flute {

int decode_w3(FLUTE_DECODE_ARGUMENTS) {
  return launch_bits<3>(matrix, config, m, x, records, table, y, ahead, stream);
}

}  // namespace flute
