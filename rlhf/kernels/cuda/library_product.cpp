// Products through cuBLASLt, opened at run time: linked, the program would not start on machines without it.
// Row-major c = a b is column-major c^T = b^T a^T, so b is the library's first matrix.
#include "rlhf/kernels/cuda/library_product.h"

#if __has_include(<cublasLt.h>)

#include <cublasLt.h>
#include <dlfcn.h>

#include <array>
#include <map>
#include <mutex>

#include "rlhf/core/error.h"

namespace rlhf::kernels::cuda {
namespace {

// The entry points that are used, under their own names.
struct Library {
  std::string problem;
  cublasLtHandle_t handle = nullptr;
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) find_algorithm = nullptr;
  decltype(&cublasLtMatmulDescCreate) make_product = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_product = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) make_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) make_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) free_preference = nullptr;

  Library() {
    const std::string name = concat("libcublasLt.so.", CUBLAS_VER_MAJOR);
    void* file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!file) file = dlopen((RLHF_CUDA_LIBRARIES "/" + name).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!file) {
      problem = concat(name, " was found neither by the loader nor in ", RLHF_CUDA_LIBRARIES);
      return;
    }
    const auto load = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, symbol));
      if (!function) problem = concat(name, " has no ", symbol);
    };
    load(create, "cublasLtCreate");
    load(matmul, "cublasLtMatmul");
    load(find_algorithm, "cublasLtMatmulAlgoGetHeuristic");
    load(make_product, "cublasLtMatmulDescCreate");
    load(set_product, "cublasLtMatmulDescSetAttribute");
    load(make_layout, "cublasLtMatrixLayoutCreate");
    load(make_preference, "cublasLtMatmulPreferenceCreate");
    load(set_preference, "cublasLtMatmulPreferenceSetAttribute");
    load(free_preference, "cublasLtMatmulPreferenceDestroy");
    if (!problem.empty()) return;
    if (const cublasStatus_t status = create(&handle); status != CUBLAS_STATUS_SUCCESS)
      problem = concat(name, ": cublasLtCreate failed with status ", static_cast<int>(status));
  }
};

const Library& library() {
  static const Library opened;
  return opened;
}

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) fail<Error>("cuBLASLt: ", what, ": status ", static_cast<int>(status));
}

template <class T>
constexpr cudaDataType_t kType = sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;

// Largest power of two, up to 256, that divides the address.
std::int64_t alignment_of(const void* data) {
  const auto address = reinterpret_cast<std::uintptr_t>(data) | 256;
  return static_cast<std::int64_t>(address & (~address + 1));
}

// A matrix of the library: [rows, columns], column-major, used as it is or transposed.
struct Operand {
  std::int64_t transposed, rows, columns, stride, alignment;
};

// What decides about the algorithm.
using Case = std::array<std::int64_t, 17>;

struct Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t first = nullptr, second = nullptr, result = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  bool found = false;
};

template <class T, class C>
Plan make_plan(const Library& lib, const Operand& first, const Operand& second, const Operand& result,
               const T* bias) {
  Plan plan;
  check(lib.make_product(&plan.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "making a product");
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    check(lib.set_product(plan.product, attribute, &value, sizeof(value)), "describing a product");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, first.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_TRANSB, second.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (bias) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, kType<T>);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  }
  const auto layout = [&](cublasLtMatrixLayout_t& out, cudaDataType_t type, const Operand& of) {
    check(lib.make_layout(&out, type, static_cast<std::uint64_t>(of.rows),
                          static_cast<std::uint64_t>(of.columns), of.stride),
          "describing a matrix");
  };
  layout(plan.first, kType<T>, first);
  layout(plan.second, kType<T>, second);
  layout(plan.result, kType<C>, result);
  cublasLtMatmulPreference_t preference = nullptr;
  check(lib.make_preference(&preference), "making a preference");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check(lib.set_preference(preference, attribute, &value, sizeof(value)), "setting a preference");
  };
  // No workspace: the algorithms that need one split the sum, in an order that depends on the shape. On an
  // H200 they decoded a 0.5B model 10 % faster at one row and 10 % slower at 64 (docs/results/gpu.md).
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::size_t{0});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<std::uint32_t>(first.alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<std::uint32_t>(second.alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<std::uint32_t>(result.alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<std::uint32_t>(result.alignment));
  cublasLtMatmulHeuristicResult_t best{};
  int count = 0;
  const cublasStatus_t status = lib.find_algorithm(lib.handle, plan.product, plan.first, plan.second,
                                                   plan.result, plan.result, preference, 1, &best, &count);
  lib.free_preference(preference);
  plan.found = status == CUBLAS_STATUS_SUCCESS && count > 0;
  plan.algorithm = best.algo;
  return plan;
}

}  // namespace

const std::string& library_problem() {
  return library().problem;
}

template <class T, class C>
bool try_library_product(const LibraryProduct<T, C>& args, void* queue) {
  const Library& lib = library();
  const bool b_transposed = args.b_column != 1, a_transposed = args.a_column != 1;
  if (!lib.problem.empty() || args.M == 0 || args.N == 0 || args.K == 0 ||
      (b_transposed && args.b_row != 1) || (a_transposed && args.a_row != 1))
    return false;
  const Operand first = b_transposed ? Operand{1, args.K, args.N, args.b_column, alignment_of(args.b)}
                                     : Operand{0, args.N, args.K, args.b_row, alignment_of(args.b)};
  const Operand second = a_transposed ? Operand{1, args.M, args.K, args.a_column, alignment_of(args.a)}
                                      : Operand{0, args.K, args.M, args.a_row, alignment_of(args.a)};
  const Operand result{0, args.N, args.M, args.ldc, alignment_of(args.c)};
  static std::mutex mutex;
  static std::map<Case, Plan> plans;
  const std::lock_guard lock(mutex);
  const Case key = {first.transposed,
                    first.rows,
                    first.columns,
                    first.stride,
                    first.alignment,
                    second.transposed,
                    second.rows,
                    second.columns,
                    second.stride,
                    second.alignment,
                    result.stride,
                    result.alignment,
                    args.bias ? 1 : 0,
                    args.accumulate ? 1 : 0,
                    args.M,
                    args.N,
                    args.K};
  auto found = plans.find(key);
  if (found == plans.end())
    found = plans.emplace(key, make_plan<T, C>(lib, first, second, result, args.bias)).first;
  const Plan& plan = found->second;
  if (!plan.found) return false;
  if (args.bias)
    check(lib.set_product(plan.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &args.bias, sizeof(args.bias)),
          "setting the bias");
  const float one = 1, beta = args.accumulate ? 1 : 0;
  check(lib.matmul(lib.handle, plan.product, &one, args.b, plan.first, args.a, plan.second, &beta, args.c,
                   plan.result, args.c, plan.result, &plan.algorithm, nullptr, 0,
                   static_cast<cudaStream_t>(queue)),
        "queueing a product");
  return true;
}

}  // namespace rlhf::kernels::cuda

#else

namespace rlhf::kernels::cuda {

const std::string& library_problem() {
  static const std::string problem = "cublasLt.h was missing when this program was built";
  return problem;
}

template <class T, class C>
bool try_library_product(const LibraryProduct<T, C>&, void*) {
  return false;
}

}  // namespace rlhf::kernels::cuda

#endif

namespace rlhf::kernels::cuda {

template bool try_library_product<float, float>(const LibraryProduct<float, float>&, void*);
template bool try_library_product<Bfloat16, Bfloat16>(const LibraryProduct<Bfloat16, Bfloat16>&, void*);
template bool try_library_product<Bfloat16, float>(const LibraryProduct<Bfloat16, float>&, void*);

}  // namespace rlhf::kernels::cuda
