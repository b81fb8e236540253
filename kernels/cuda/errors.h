// Errors of our own, beside those of the CUDA runtime (which are below 10000).
#pragma once

namespace flute {

enum Error {
  kBadShape = 10001,      // a shape, dtype, bit width or group size outside the format
  kBadConfig = 10002,     // a launch configuration that this device or problem does not allow
  kNoTensorMaps = 10003,  // the driver does not offer cuTensorMapEncodeTiled
};

}  // namespace flute
