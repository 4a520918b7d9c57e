#pragma once

#include <string>

#include "rlhf/verify/report.h"

namespace rlhf {

/// True when the file is a vector file (`"format": "golden-1"` with `"cases"`) of a family checked here.
/// Reads the whole file; @throws IoError when it cannot be read.
bool is_vector_file(const std::string& path);

/// Runs every case of one golden vector file through the library's own functions and compares all outputs,
/// gradients and metrics included. A family, function, parameter, input or output that is not known is a
/// failure with a message, never a skip; so is an exception in a case. Tolerances, relative to the largest
/// magnitude of an output: 1e-10 for float64, 1e-5 for float32, 1e-6 for metrics, wider where the reference
/// computes in single precision.
/// @throws IoError when the file cannot be read or is not JSON (path and position named).
VerifyResult verify_vectors(const std::string& path);

}  // namespace rlhf
