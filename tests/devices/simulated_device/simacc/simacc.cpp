// A simulated accelerator for PyTorch (PrivateUse1): memory is the host's, kernels run on the host,
// but devices, contexts, generators and dispatch are its own. Modelled on how CUDA behaves:
// a 16-byte Philox state (seed, offset), lazy initialisation, contexts made by the first allocation,
// a forked child of an initialised process is "bad".
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pthread.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

namespace {
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
constexpr auto kSim = c10::DeviceType::PrivateUse1;

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

// ---------------------------------------------------------------- the runtime
const int kDevices = from_environment("SIMACC_DEVICES", 2);
// Bytes of a generator's state after seed and offset: other accelerators' are longer than CUDA's.
const int kTail = from_environment("SIMACC_STATE_TAIL", 0);
bool initialised = false, bad_fork = false;
std::vector<bool> contexts(kDevices, false);
thread_local DeviceIndex current = 0;

void init() {
  TORCH_CHECK(!bad_fork, "Cannot re-initialize simacc in forked subprocess. Use 'spawn'.");
  if (initialised) return;
  initialised = true;
  pthread_atfork(nullptr, nullptr, [] { bad_fork = true; });
}

void set_device(int64_t index) {
  TORCH_CHECK(0 <= index && index < kDevices, "simacc: invalid device ordinal ", index);
  current = static_cast<DeviceIndex>(index);
}

DeviceIndex exchange(DeviceIndex index) {
  DeviceIndex before = current;
  if (index >= 0) set_device(index);
  return before;
}

void touch(DeviceIndex index) {
  init();
  contexts[index] = true;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  Device exchangeDevice(Device d) const override { return Device(kSim, exchange(d.index())); }
  Device getDevice() const override { return Device(kSim, current); }
  void setDevice(Device d) const override { set_device(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  // One stream a device, in order and already done: kernels run when they are called.
  c10::Stream getNewStream(Device d, int) const override { return getStream(d); }
  c10::Stream getDefaultStream(Device d) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    touch(current);
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    return {memory, memory, &std::free, Device(kSim, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
} allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

void resize_storage(const c10::Storage& storage, size_t bytes) {
  const c10::DeviceGuard guard(storage.device());
  auto memory = allocator.allocate(bytes);
  const auto kept = std::min(bytes, storage.nbytes());
  if (kept) std::memcpy(memory.get(), storage.data(), kept);
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

// ---------------------------------------------------------------- generators
struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex index)
      : GeneratorImpl(Device(kSim, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  static c10::DeviceType device_type() { return kSim; }

  void set_current_seed(uint64_t seed) override { seed_ = seed, offset_ = 0, draws_ = 0; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_offset(uint64_t offset) override {
    TORCH_CHECK(offset % 4 == 0, "offset must be a multiple of 4");
    offset_ = offset;
  }
  uint64_t get_offset() const override { return offset_; }

  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::zeros({16 + kTail}, at::device(at::kCPU).dtype(at::kByte));
    auto* bytes = state.data_ptr<uint8_t>();
    std::memcpy(bytes, &seed_, 8);
    std::memcpy(bytes + 8, &offset_, 8);
    if (kTail >= 4) std::memcpy(bytes + 16, &draws_, 4);
    return state.getIntrusivePtr();
  }
  void set_state(const c10::TensorImpl& state) override {
    at::detail::check_rng_state(state);
    TORCH_CHECK(state.numel() == 16 + kTail, "RNG state is wrong size");
    const auto* bytes = static_cast<const uint8_t*>(state.data());
    uint64_t seed, offset;
    std::memcpy(&seed, bytes, 8);
    std::memcpy(&offset, bytes + 8, 8);
    set_offset(offset);  // throws on a malformed one, as CUDA does
    seed_ = seed;
    if (kTail >= 4) std::memcpy(&draws_, bytes + 16, 4);
  }

  // The engine of element `i` of one operation; next_operation() moves the stream on.
  at::Philox4_32 engine(uint64_t i) const { return at::Philox4_32(seed_, i, offset_ / 4); }
  void next_operation() { offset_ += 4, ++draws_; }

 private:
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->seed_ = seed_, copy->offset_ = offset_, copy->draws_ = draws_;
    return copy;
  }
  uint64_t seed_ = c10::default_rng_seed_val, offset_ = 0;
  uint32_t draws_ = 0;
};

const at::Generator& default_generator(DeviceIndex index) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (int i = 0; i < kDevices; ++i) {
      made->push_back(at::make_generator<Generator>(static_cast<DeviceIndex>(i)));
      made->back().seed();
    }
    return made;
  }();
  return all->at(index < 0 ? current : index);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return kDevices > 0; }
  void init() const override { ::init(); }
  bool hasPrimaryContext(DeviceIndex index) const override { return contexts.at(index); }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { set_device(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange(index); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// ---------------------------------------------------------------- operators
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(Device(kSim, current)));
  return at::detail::empty_generic(size, &allocator, kKeys, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(Device(kSim, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys,
                                           at::dtype_or_default(dtype));
}

// The same memory as a CPU tensor: only kernels of the device may look at it this way.
Tensor on_host(const Tensor& self) {
  if (self.device().type() != kSim) return self;
  auto* owner = new c10::Storage(self.storage());
  c10::DataPtr data(const_cast<void*>(owner->data()), owner,
                    [](void* its) { delete static_cast<c10::Storage*>(its); }, at::kCPU);
  const c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data));
  return at::empty({0}, self.options().device(at::kCPU))
      .set_(storage, self.storage_offset(), self.sizes(), self.strides());
}

c10::IValue on_host(const c10::IValue& value) {
  if (value.isTensor()) return on_host(value.toTensor());
  if (!value.isList()) return value;
  const auto all = value.toList();
  c10::impl::GenericList host(all.elementType());
  for (const c10::IValue& each : all) host.push_back(on_host(each));
  return host;
}

// The same backend under the name of the CPU's: a group need not serve the CPU itself.
c10::IValue on_host(const c10::intrusive_ptr<c10d::ProcessGroup>& group) {
  auto host = c10::make_intrusive<c10d::ProcessGroup>(group->getRank(), group->getSize());
  host->setBackend(at::kCPU, c10d::ProcessGroup::BackendType::GLOO, group->getBackend(kSim));
  return host;
}

// Collectives are gloo's, on the same memory.
void collective(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  auto* value = stack->data() + stack->size() - arguments.size();
  for (const auto& argument : arguments) {
    *value = argument.name() == "process_group"
                 ? on_host(value->toCustomClass<c10d::ProcessGroup>())
                 : on_host(*value);
    ++value;
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  on_host(to).copy_(on_host(self));
  return to;
}

// For results of the fallback, which begin without memory of their own.
const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto bytes = at::detail::computeStorageNbytesContiguous(
      size, self.dtype().itemsize(), self.storage_offset());
  if (bytes > self.storage().nbytes()) resize_storage(self.storage(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_view(Tensor& self, c10::Storage storage, int64_t offset, at::IntArrayRef size,
                 at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, stride);
  return self;
}
Tensor& set_(Tensor& self, c10::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_view(self, std::move(storage), 0, {count}, {1});
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (self.sizes() != to.sizes()) resize_(to, self.sizes(), std::nullopt);
  return copy_from(self, to, false);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // The CPU's kernel would draw from the CPU's generator, which no accelerator does.
  for (const auto& argument : op.schema().arguments())
    TORCH_CHECK(!argument.type()->str().starts_with("Generator"),
                "simacc: ", op.schema().operator_name(), " is not simulated");
  at::native::cpu_fallback(op, stack);
}

// Fill `self` with draw(engine) of each element, from the generator given or the device's own.
template <class Draw>
Tensor& fill(Tensor& self, const std::optional<at::Generator>& given, at::ScalarType as,
             Draw draw) {
  touch(self.device().index());
  auto* generator = at::get_generator_or_default<Generator>(
      given, default_generator(self.device().index()));
  auto values = at::empty(self.sizes(), at::device(at::kCPU).dtype(as));
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  for (int64_t i = 0; i < values.numel(); ++i) {
    auto engine = generator->engine(i);
    auto* data = values.mutable_data_ptr();
    if (as == at::kLong) static_cast<int64_t*>(data)[i] = static_cast<int64_t>(draw(engine));
    else static_cast<double*>(data)[i] = static_cast<double>(draw(engine));
  }
  generator->next_operation();
  return self.copy_(values);
}

double unit(at::Philox4_32& engine) { return (engine() >> 8) * 0x1p-24; }  // [0, 1) as a float too

Tensor& uniform_(Tensor& self, double low, double high, std::optional<at::Generator> g) {
  return fill(self, g, at::kDouble, [=](auto& e) { return low + (high - low) * unit(e); });
}

Tensor& normal_(Tensor& self, double mean, double std, std::optional<at::Generator> g) {
  return fill(self, g, at::kDouble, [=](auto& e) {
    const double radius = std::sqrt(-2 * std::log1p(-unit(e)));
    return mean + std * radius * std::cos(6.283185307179586 * unit(e));
  });
}

Tensor& bernoulli_(Tensor& self, double p, std::optional<at::Generator> g) {
  return fill(self, g, at::kDouble, [=](auto& e) { return unit(e) < p; });
}

Tensor& random_from_(Tensor& self, int64_t from, std::optional<int64_t> to,
                     std::optional<at::Generator> g) {
  const uint64_t range = to ? *to - from : uint64_t{1} << 62;
  return fill(self, g, at::kLong, [=](auto& e) {
    const uint64_t high = e();
    return from + static_cast<int64_t>((high << 32 | e()) % range);
  });
}
Tensor& random_to_(Tensor& self, int64_t to, std::optional<at::Generator> g) {
  return random_from_(self, 0, to, std::move(g));
}
Tensor& random_(Tensor& self, std::optional<at::Generator> g) {
  return random_from_(self, 0, int64_t{1} << 24, std::move(g));
}

Tensor& randperm_out(int64_t n, std::optional<at::Generator> g, Tensor& out) {
  return out.copy_(at::empty({n}, out.options().dtype(at::kDouble)).uniform_(0, 1, std::move(g))
                       .cpu().argsort());
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& self, double p, std::optional<bool>) {
  auto mask = at::empty_like(self, at::kBool).bernoulli_(1 - p);
  return {self * mask / (1 - p), mask};
}
}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_);
  m.impl("set_.source_Storage_storage_offset", &set_view);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("uniform_", &uniform_);
  m.impl("normal_", &normal_);
  m.impl("bernoulli_.float", &bernoulli_);
  m.impl("random_", &random_);
  m.impl("random_.to", &random_to_);
  m.impl("random_.from", &random_from_);
  m.impl("randperm.generator_out", &randperm_out);
  m.impl("native_dropout", &native_dropout);
}

constexpr const char* kCollectives[] = {
    "broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_",
    "allgather_into_tensor_coalesced_", "reduce_", "reduce_scatter_", "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_", "gather_", "scatter_", "alltoall_", "alltoall_base_"};

TORCH_LIBRARY_IMPL(c10d, PrivateUse1, m) {
  for (const char* name : kCollectives)
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
}

// Not every torch lets these pass autograd by itself.
TORCH_LIBRARY_IMPL(c10d, AutogradPrivateUse1, m) {
  for (const char* name : kCollectives) m.impl(name, torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(fsdp, AutogradPrivateUse1, m) {
  for (const char* name : {"all_gather_copy_in", "split_with_sizes_copy", "chunk_cat"})
    m.impl(name, torch::CppFunction::makeFallthrough());
}

// What the Python module is made of.
TORCH_LIBRARY(simacc, m) {
  m.def("init", [] { init(); });
  m.def("is_initialized", [] { return initialised && !bad_fork; });
  m.def("is_in_bad_fork", [] { return bad_fork; });
  m.def("device_count", [] { return int64_t{kDevices}; });
  m.def("get_device", [] { return int64_t{current}; });
  m.def("set_device", [](int64_t index) { set_device(index); });
  m.def("has_context", [](int64_t index) { return bool{contexts.at(index)}; });
  m.def("default_generator", [](int64_t index) { return default_generator(index); });
}
