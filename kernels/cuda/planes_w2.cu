// The kernels of bit planes, for 2-bit codes.
#include "decode_launch.cuh"

namespace flute {

int planes_w2(FLUTE_DECODE_ARGUMENTS) {
  if (m != 1 || config.warps != 32 || groups_in_tile(matrix.group_size) != 1 ||
      config.row_tiles < 1 || config.row_warps < 1)
    return kBadConfig;
#ifndef FLUTE_FEW_SHAPES
  if (matrix.dtype == FLUTE_FLOAT16)
    return launch_shape<PlaneShape<2, __half>>(matrix, config, m, x, records, table, y, ahead,
                                               stream);
#endif
  return launch_shape<PlaneShape<2, __nv_bfloat16>>(matrix, config, m, x, records, table, y, ahead,
                                                    stream);
}

}  // namespace flute
