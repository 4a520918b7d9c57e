#include "rlhf/kernels/cuda_device.h"

#include <cuda_runtime.h>

#include <exception>

#include "rlhf/core/error.h"
#include "rlhf/kernels/cuda/library_product.h"
#include "rlhf/tensor/allocation_counter.h"

namespace rlhf {
namespace {

constexpr int kLeastMajor = 8;  // the first with bf16 tensor cores

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky
    fail<MemoryError>("CUDA: ", what, ": out of device memory");
  }
  fail<Error>("CUDA: ", what, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
}

// The static runtime looks for the driver when it is first called; without one this program runs on the CPU.
std::string driver_problem() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "no NVIDIA driver was found (libcuda.so.1 is part of it)";
  if (driver / 1000 < CUDART_VERSION / 1000)
    return concat("the NVIDIA driver supports CUDA ", driver / 1000, ".", driver % 1000 / 10,
                  ", this build needs ", CUDART_VERSION / 1000, ".0 or newer");
  return "";
}

class StreamDevice : public CudaDevice {
 public:
  explicit StreamDevice(int index, bool urgent = false,
                        std::shared_ptr<AllocationCounter> counter = std::make_shared<AllocationCounter>())
      : index_(index), counter_(std::move(counter)) {
    int least = 0, most = 0;
    check(cudaSetDevice(index), "choosing the GPU");
    check(cudaDeviceGetStreamPriorityRange(&least, &most), "asking for priorities of streams");
    check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, urgent ? most : least),
          "making a stream");
  }
  ~StreamDevice() override { cudaStreamDestroy(stream_); }

  void* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    use();
    check(cudaMalloc(&memory, bytes), "allocating");
    counter_->add(memory, bytes);
    return memory;
  }
  void release(void* memory) noexcept override {
    cudaSetDevice(index_);
    cudaStreamSynchronize(stream_);  // a kernel may still read it
    counter_->remove(memory);
    cudaFree(memory);
  }
  std::size_t peak_bytes() const override { return counter_->peak_bytes(); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    use();
    // From pageable memory the copy is staged before the call returns; from pinned memory it is not.
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copying to the GPU");
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    use();
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "copying from the GPU");
    synchronize();
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    use();
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(queue())),
          "copying on the GPU");
  }
  void zero(void* memory, std::size_t bytes) override {
    use();
    check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(queue())), "clearing memory");
  }
  void synchronize() override {
    use();
    check(cudaStreamSynchronize(stream_), "waiting for kernels");
  }
  // Asked for before every kernel, which goes to the current device of the calling thread.
  void* queue() override {
    use();
    return recorded_ == this ? recording_stream_ : stream_;
  }
  std::unique_ptr<DeviceMemory> new_queue(bool urgent) override {
    return std::make_unique<StreamDevice>(index_, urgent, counter_);
  }
  void wait_for(DeviceMemory& other) override {
    cudaEvent_t event = nullptr;
    use();
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    // An event may go while a stream still waits for it.
    const std::unique_ptr<CUevent_st, cudaError_t (*)(cudaEvent_t)> owner(event, cudaEventDestroy);
    check(cudaEventRecord(event, static_cast<cudaStream_t>(other.queue())), "recording an event");
    check(cudaStreamWaitEvent(stream_, event, 0), "waiting for another stream");
  }
  void queue_download(void* to, const void* from, std::size_t bytes) override {
    use();
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "copying from the GPU");
  }
  void pin(void* memory, std::size_t bytes) override {
    use();
    check(cudaHostRegister(memory, bytes, cudaHostRegisterDefault), "pinning memory of the host");
  }
  void unpin(void* memory) noexcept override {
    cudaSetDevice(index_);
    cudaStreamSynchronize(stream_);  // a copy may still use it
    cudaHostUnregister(memory);
  }
  std::unique_ptr<Recording> record(const std::function<void()>& work) override;
  std::size_t free_bytes() const override { return memory_info().free; }
  std::size_t total_bytes() const override { return memory_info().total; }

 private:
  struct MemoryInfo {
    std::size_t free = 0, total = 0;
  };
  MemoryInfo memory_info() const {
    MemoryInfo info;
    use();
    check(cudaMemGetInfo(&info.free, &info.total), "asking for free memory");
    return info;
  }
  // The current device is a property of the calling thread.
  void use() const { check(cudaSetDevice(index_), "choosing the GPU"); }

  int index_;
  std::shared_ptr<AllocationCounter> counter_;
  cudaStream_t stream_ = nullptr;
  // Recording happens on a stream of its own: what other threads queue meanwhile is not recorded.
  static thread_local const StreamDevice* recorded_;
  static thread_local cudaStream_t recording_stream_;
};
thread_local const StreamDevice* StreamDevice::recorded_ = nullptr;
thread_local cudaStream_t StreamDevice::recording_stream_ = nullptr;

class Graph : public DeviceMemory::Recording {
 public:
  Graph(cudaGraphExec_t graph, cudaStream_t stream, int index)
      : graph_(graph), stream_(stream), index_(index) {}
  ~Graph() override { cudaGraphExecDestroy(graph_); }
  void replay() override {
    check(cudaSetDevice(index_), "choosing the GPU");
    check(cudaGraphLaunch(graph_, stream_), "queueing a graph");
  }

 private:
  cudaGraphExec_t graph_;
  cudaStream_t stream_;
  int index_;
};

std::unique_ptr<DeviceMemory::Recording> StreamDevice::record(const std::function<void()>& work) {
  use();
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  const std::unique_ptr<CUstream_st, cudaError_t (*)(cudaStream_t)> owner(stream, cudaStreamDestroy);
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning a graph");
  recorded_ = this;
  recording_stream_ = stream;
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  recorded_ = nullptr;
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
  if (error) {
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();  // of the capture that was given up
    std::rethrow_exception(error);
  }
  check(ended, "ending a graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(made, "making a graph");
  return std::make_unique<Graph>(executable, stream_, index_);
}

}  // namespace

CudaStatus cuda_status(int index) {
  if (std::string problem = driver_problem(); !problem.empty()) return {false, problem};
  int count = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess)
    return {false, concat("no GPU can be used: ", cudaGetErrorString(status))};
  if (index >= count) return {false, concat("there is no GPU number ", index, "; this machine has ", count)};
  cudaDeviceProp properties{};
  if (const cudaError_t status = cudaGetDeviceProperties(&properties, index); status != cudaSuccess)
    return {false, concat("GPU ", index, " does not answer: ", cudaGetErrorString(status))};
  if (properties.major < kLeastMajor)
    return {false, concat(properties.name, " has compute capability ", properties.major, ".",
                          properties.minor, ", expected ", kLeastMajor, ".0 or newer")};
  return {true, concat(properties.name, ", compute capability ", properties.major, ".", properties.minor,
                       ", ", properties.totalGlobalMem >> 20, " MiB, ", properties.multiProcessorCount,
                       " multiprocessors")};
}

std::unique_ptr<CudaDevice> CudaDevice::open(int index) {
  const CudaStatus status = cuda_status(index);
  if (!status.usable) fail<Error>("device: cuda: ", status.text);
  return std::make_unique<StreamDevice>(index);
}

namespace kernels::cuda {
template <class T>
void fill_rows(DeviceKernels<T>&);
template <class T>
void fill_attention(DeviceKernels<T>&);
}  // namespace kernels::cuda

namespace {

template <class T>
const kernels::DeviceKernels<T>& own_kernels() {
  static const kernels::DeviceKernels<T> kernels = [] {
    kernels::DeviceKernels<T> table{};
    table.name = "cuda";
    kernels::cuda::fill_rows(table);
    kernels::cuda::fill_attention(table);
    return table;
  }();
  return kernels;
}

template <class T, class Y>
bool try_library(const kernels::LinearArgs<T, Y>& args, std::int64_t M, std::int64_t N, void* queue) {
  return kernels::cuda::try_library_product<T, Y>(
      {args.x, args.ldx, 1, args.w, 1, args.K, args.bias, args.y, args.ldy, M, N, args.K, args.accumulate},
      queue);
}

template <class T, class C>
bool try_library(const kernels::GemmArgs<T, C>& args, void* queue) {
  return kernels::cuda::try_library_product<T, C>(
      {args.a, args.a_row_stride, args.a_col_stride, args.b, args.ldb, 1, nullptr, args.c, args.ldc, args.M,
       args.N, args.K, args.accumulate},
      queue);
}

// The own kernels are what runs where the library is missing or has nothing for a case.
template <class T>
const kernels::DeviceKernels<T>& library_kernels() {
  static const kernels::DeviceKernels<T> kernels = [] {
    kernels::DeviceKernels<T> table = own_kernels<T>();
    table.prefers_few_rows = table.few_rows_linear != nullptr;
    table.linear = [](const kernels::LinearArgs<T>& args, std::int64_t M, std::int64_t N, void* queue) {
      if (!try_library(args, M, N, queue)) own_kernels<T>().linear(args, M, N, queue);
    };
    table.linear_wide = [](const kernels::LinearArgs<T, Wide<T>>& args, std::int64_t M, std::int64_t N,
                           void* queue) {
      if (!try_library(args, M, N, queue)) own_kernels<T>().linear_wide(args, M, N, queue);
    };
    table.gemm = [](const kernels::GemmArgs<T>& args, void* queue) {
      if (!try_library(args, queue)) own_kernels<T>().gemm(args, queue);
    };
    table.gemm_wide = [](const kernels::GemmArgs<T, Wide<T>>& args, void* queue) {
      if (!try_library(args, queue)) own_kernels<T>().gemm_wide(args, queue);
    };
    return table;
  }();
  return kernels;
}

}  // namespace

template <class T>
const kernels::DeviceKernels<T>& cuda_device_kernels(CudaProducts products) {
  return products == CudaProducts::kOwn ? own_kernels<T>() : library_kernels<T>();
}
template const kernels::DeviceKernels<float>& cuda_device_kernels<float>(CudaProducts);
template const kernels::DeviceKernels<Bfloat16>& cuda_device_kernels<Bfloat16>(CudaProducts);

const std::string& cuda_library_problem() {
  return kernels::cuda::library_problem();
}

}  // namespace rlhf
