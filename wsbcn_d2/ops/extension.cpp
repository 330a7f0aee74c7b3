/* Convolutions and batch-channel normalization as one differentiable operation, without Python.

   The nodes of the graph that branch.py and batch_channel_norm.py make by autograd functions of
   Python, and what these call, here in C++: with one image a step, a GPU waits for the host, and
   what Python needs for these is most of what they cost. It is those modules that say how and why.
   Kernels are called without Python, too: those in C by their address, and those of Triton by the
   function of Triton's that launches them, once triton_backend.py has handed over what there is to
   launch. Whatever is not known here is done by the backend in Python; where something wants to see
   the operations or replaces them, the answer is None, and nothing has been done. */

#include <Python.h>

#include <ATen/Context.h>
#include <ATen/DeviceGuard.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::DispatchKey;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/* ---- Python ---- */

struct WithGil {
    PyGILState_STATE state = PyGILState_Ensure();
    ~WithGil() {
        PyGILState_Release(state);
    }
};

/* For threads that have it. */
struct WithoutGil {
    PyThreadState *state = PyEval_SaveThread();
    ~WithoutGil() {
        PyEval_RestoreThread(state);
    }
};

/* A reference that may be let go without the GIL. */
class Reference {
  public:
    Reference() = default;
    explicit Reference(PyObject *owned) : object_(owned) {}
    Reference(Reference &&other) noexcept {
        std::swap(object_, other.object_);
    }
    Reference &operator=(Reference &&other) noexcept {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Reference() {
        if (object_ && Py_IsInitialized()) {
            WithGil gil;
            Py_DECREF(object_);
        }
    }
    static Reference to(PyObject *borrowed) {
        Py_INCREF(borrowed);
        return Reference(borrowed);
    }
    PyObject *get() const {
        return object_;
    }
    PyObject *release() {
        return std::exchange(object_, nullptr);
    }

  private:
    PyObject *object_ = nullptr;
};

[[noreturn]] void throw_error_of_python() {
    python_error error;
    error.persist();
    throw error;
}

Reference checked(PyObject *owned) {
    if (!owned)
        throw_error_of_python();
    return Reference(owned);
}

bool truth_of(PyObject *object) {
    int truth = PyObject_IsTrue(object);
    if (truth < 0)
        throw_error_of_python();
    return truth;
}

double number_of(PyObject *object) {
    double number = PyFloat_AsDouble(object);
    if (number == -1 && PyErr_Occurred())
        throw_error_of_python();
    return number;
}

int64_t integer_of(PyObject *object) {
    int64_t integer = PyLong_AsLongLong(object);
    if (integer == -1 && PyErr_Occurred())
        throw_error_of_python();
    return integer;
}

void *pointer_of(PyObject *object) {
    void *pointer = PyLong_AsVoidPtr(object);
    if (!pointer && PyErr_Occurred())
        throw_error_of_python();
    return pointer;
}

/* An undefined one for None. */
Tensor tensor_of(PyObject *object) {
    if (object == Py_None)
        return Tensor();
    TORCH_CHECK_TYPE(
        THPVariable_Check(object), "expected a tensor, got ", Py_TYPE(object)->tp_name
    );
    return THPVariable_Unpack(object);
}

Reference object_of(const Tensor &tensor) {
    return tensor.defined() ? checked(THPVariable_Wrap(tensor)) : Reference::to(Py_None);
}

Reference object_of(bool value) {
    return Reference::to(value ? Py_True : Py_False);
}

Reference object_of(double value) {
    return checked(PyFloat_FromDouble(value));
}

Reference object_of(std::optional<double> value) {
    return value ? object_of(*value) : Reference::to(Py_None);
}

Reference object_of(int64_t value) {
    return checked(PyLong_FromLongLong(value));
}

Reference object_of(const void *address) {
    return address ? checked(PyLong_FromVoidPtr(const_cast<void *>(address)))
                   : Reference::to(Py_None);
}

/* The items of a sequence; must not outlive it. */
class Items {
  public:
    Items(PyObject *sequence, Py_ssize_t size) : Items(sequence) {
        TORCH_CHECK_TYPE(size_ == size, "expected ", size, " items, got ", size_);
    }
    explicit Items(PyObject *sequence)
        : fast_(checked(PySequence_Fast(sequence, "expected a sequence"))),
          size_(PySequence_Fast_GET_SIZE(fast_.get())) {}
    PyObject *operator[](Py_ssize_t index) const {
        return PySequence_Fast_GET_ITEM(fast_.get(), index);
    }
    Py_ssize_t size() const {
        return size_;
    }

  private:
    Reference fast_;
    Py_ssize_t size_;
};

template <typename Value>
std::vector<Value> each(PyObject *sequence, Value (*value_of)(PyObject *)) {
    Items items(sequence);
    std::vector<Value> values;
    values.reserve(items.size());
    for (Py_ssize_t i = 0; i < items.size(); i++)
        values.push_back(value_of(items[i]));
    return values;
}

template <typename... Values>
Reference called(PyObject *object, const char *name, const Values &...values) {
    Reference function = checked(PyObject_GetAttrString(object, name));
    Reference arguments = checked(PyTuple_New(sizeof...(values)));
    Py_ssize_t next = 0;
    (PyTuple_SET_ITEM(arguments.get(), next++, object_of(values).release()), ...);
    return checked(PyObject_Call(function.get(), arguments.get(), nullptr));
}

/* ---- What the operations are given and give; batch_channel_norm.py has the names ---- */

struct Options {
    std::optional<double> update_rate;
    double eps;
    bool use_batch_statistics, synchronize;
};

struct Layer {
    Tensor weight, bias, group_weight, group_bias;
    Tensor running_mean, running_var, skipped_updates, seen_elements;
    Options options;

    std::array<const Tensor *, 4> parameters() const {
        return {&weight, &bias, &group_weight, &group_bias};
    }
    std::array<const Tensor *, 4> state() const {
        return {&running_mean, &running_var, &skipped_updates, &seen_elements};
    }
    int64_t groups() const {
        return group_weight.numel();
    }
};

struct Output {
    Tensor y, tables;
};

struct Gradients {
    Tensor x, residual, parameters;
};

/* What a backward pass is given beside the gradient. */
struct Saved {
    Tensor x, y, weight, group_weight, tables;
    bool relu, has_residual, synchronize;
};

const void *address(const Tensor &tensor) {
    return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

void *to_write(const Tensor &tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

/* Of tables.py, without the statistics of the batch. */
int64_t tables_size(const Tensor &x, int64_t groups) {
    return 2 * x.size(1) + x.size(0) * (5 * x.size(1) + groups);
}

Tensor new_tables(const Tensor &x, int64_t groups) {
    auto dtype = c10::promoteTypes(x.scalar_type(), at::kFloat);
    return at::empty({tables_size(x, groups)}, x.options().dtype(dtype));
}

Tensor new_row(const Tensor &tables, int64_t size) {
    return at::empty({size}, tables.options());
}

/* ---- Kernels in C, of native_kernels.c, for what native_backend.py takes for fit for them ---- */

struct Native {
    int (*forward)(
        const void *, const void *, void *, void *, const void *, const void *, const void *,
        const void *, void *, void *, void *, double, double, int, int, int64_t, int64_t, int64_t,
        int64_t, int
    );
    void (*again)(const void *, void *, void *, int, int64_t, int64_t, int64_t, int64_t, int);
    void (*backward)(
        const void *, const void *, const void *, void *, void *, void *, void *, const void *,
        const void *, void *, int, int64_t, int64_t, int64_t, int64_t, int
    );
};

Native native;

/* What to normalize by. */
enum { FIXED = 1, UPDATED = 2 };

bool native_reads(const Tensor &tensor) {
    return tensor.is_cpu() && tensor.layout() == at::kStrided &&
        tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && address(tensor);
}

bool native_reads(const Tensor &table, int64_t size) {
    return native_reads(table) && table.numel() == size;
}

bool native_reads_activation(const Tensor &x, int64_t groups) {
    return x.dim() == 4 && native_reads(x) && groups > 0 && x.size(1) % groups == 0;
}

std::optional<Output> native_forward(
    const Tensor &x, const Tensor &residual, const Layer &layer, bool relu
) {
    int64_t groups = layer.groups();
    if (layer.options.use_batch_statistics || !native_reads_activation(x, groups))
        return {};
    int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    for (auto table : {&layer.weight, &layer.bias, &layer.running_mean, &layer.running_var})
        if (!native_reads(*table, channels))
            return {};
    for (auto table : {&layer.group_weight, &layer.group_bias})
        if (!native_reads(*table, groups))
            return {};
    if (layer.seen_elements.defined() && !native_reads(layer.seen_elements, 1))
        return {};
    Tensor added = residual.defined() ? residual.contiguous() : residual;
    if (added.defined() && !(native_reads(added) && added.sizes() == x.sizes()))
        return {};
    Output out{at::empty_like(x), new_tables(x, groups)};
    auto rate = layer.options.update_rate;
    int updated;
    {
        WithoutGil no_gil;
        updated = native.forward(
            address(x), address(added), to_write(out.y), to_write(out.tables),
            address(layer.weight), address(layer.bias), address(layer.group_weight),
            address(layer.group_bias), to_write(layer.running_mean), to_write(layer.running_var),
            to_write(layer.seen_elements), rate.value_or(0), layer.options.eps,
            rate ? UPDATED : FIXED, relu, images, channels, groups, pixels, at::get_num_threads()
        );
    }
    if (!updated && layer.skipped_updates.defined())
        layer.skipped_updates.add_(1);
    return out;
}

std::optional<Tensor> native_again(
    const Tensor &x, const Tensor &tables, int64_t groups, bool relu
) {
    if (!native_reads_activation(x, groups) || !native_reads(tables, tables_size(x, groups)))
        return {};
    Tensor y = at::empty_like(x);
    native.again(
        address(x), to_write(y), to_write(tables), relu, x.size(0), x.size(1), groups,
        x.size(2) * x.size(3), at::get_num_threads()
    );
    return y;
}

std::optional<Gradients> native_backward(const Tensor &given, const Saved &saved) {
    const Tensor &x = saved.x;
    int64_t groups = saved.group_weight.numel();
    if (!native_reads_activation(x, groups) || given.sizes() != x.sizes() ||
        !native_reads(saved.tables, tables_size(x, groups)) ||
        !native_reads(saved.weight, x.size(1)) || !native_reads(saved.group_weight, groups))
        return {};
    int64_t images = x.size(0), channels = x.size(1);
    bool reads_y = saved.relu && saved.has_residual;
    Tensor grad = given.contiguous(), y = reads_y ? saved.y.contiguous() : Tensor();
    if (!native_reads(grad) || (reads_y && !native_reads(y)))
        return {};
    Gradients out{
        at::empty_like(x), reads_y ? at::empty_like(x) : Tensor(),
        new_row(saved.tables, 2 * (channels + groups))
    };
    Tensor scratch = new_row(saved.tables, images * (4 * channels + 2 * groups));
    native.backward(
        address(grad), address(x), address(y), to_write(out.x), to_write(out.residual),
        to_write(saved.tables), to_write(scratch), address(saved.weight),
        address(saved.group_weight), to_write(out.parameters), saved.relu, images, channels, groups,
        x.size(2) * x.size(3), at::get_num_threads()
    );
    return out;
}

/* ---- Kernels of Triton, as triton_backend.py and launch.py launch them; all with the GIL ---- */

/* What stays the same: the function in C that launches a compiled kernel, the grid, the arguments
   between the stream and those of the kernel, and the last ones of the kernel. */
struct Launch {
    Reference function, grid, constants, values;

    explicit operator bool() const {
        return function.get();
    }
};

/* The launches of a pass in their order, some of which there may not be, and the number of values
   that they share and nobody keeps. */
struct Pass {
    int64_t scratch;
    std::vector<Launch> launches;
};

/* What the choice of launches depends on: the kind of pass and its options, the activation, and for
   all tensors given the type, and whether the address is a multiple of 16. */
using Key = std::array<int64_t, 20>;

struct Hash {
    template <typename Words>
    size_t operator()(const Words &key) const {
        uint64_t result = 14695981039346656037u; /* FNV-1a */
        for (int64_t value : key)
            result = (result ^ static_cast<uint64_t>(value)) * 1099511628211u;
        return result ^ result >> 32;
    }
};

enum Kind { FORWARD, AGAIN, BACKWARD };

Key key_of(
    Kind kind, std::initializer_list<bool> options, const Tensor &x, int64_t groups,
    std::initializer_list<const Tensor *> tensors
) {
    Key key{};
    auto next = key.begin();
    int64_t bits = kind;
    for (bool option : options)
        bits = bits << 1 | option;
    *next++ = bits << 1 | x.is_contiguous();
    *next++ = static_cast<int64_t>(x.device().type()) << 8 | (x.device().index() + 1);
    for (int64_t size : x.sizes())
        *next++ = size;
    *next++ = groups;
    for (const Tensor *tensor : tensors) {
        bool aligned = reinterpret_cast<uintptr_t>(address(*tensor)) % 16 == 0;
        int64_t dtype = tensor->defined() ? static_cast<int64_t>(tensor->scalar_type()) : -1;
        *next++ = dtype << 1 | aligned;
    }
    return key;
}

/* As many as triton_backend.py remembers. */
constexpr size_t REMEMBERED = 4096;
/* These and others below are never destroyed: when a process ends, there is no GPU any more whose
   memory could be given back, and no Python. */
auto &passes = *new std::unordered_map<Key, std::shared_ptr<const Pass>, Hash>();

struct Triton {
    /* The functions of these names, and what the second gave for a device and its last stream. */
    Reference stream_of, flags_of, is_watched;
    std::unordered_map<int64_t, std::pair<int64_t, Tensor>> flags;
};

Triton &triton = *new Triton();

/* Where a pass is launched: the current stream of a device, which is the current device. */
class Stream {
  public:
    explicit Stream(const Tensor &x) : device_(x.device()) {
        Reference device = checked(THPDevice_New(device_));
        object_ = checked(
            PyObject_CallFunctionObjArgs(triton.stream_of.get(), device.get(), nullptr)
        );
    }
    PyObject *get() const {
        return object_.get();
    }
    Tensor flags() const {
        auto stream = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(get()));
        int64_t device = static_cast<int64_t>(device_.type()) << 8 | (device_.index() + 1);
        auto &[last, flags] = triton.flags[device];
        if (!flags.defined() || last != stream) {
            Reference device = checked(THPDevice_New(device_));
            Reference found = checked(PyObject_CallFunctionObjArgs(
                triton.flags_of.get(), device.get(), get(), nullptr
            ));
            last = stream;
            flags = tensor_of(found.get());
        }
        return flags;
    }

  private:
    at::Device device_;
    Reference object_;
};

void launch(
    const Launch &launch, const Stream &stream, std::initializer_list<const void *> addresses,
    std::initializer_list<double> numbers = {}
) {
    PyObject *grid = launch.grid.get(), *constants = launch.constants.get();
    PyObject *values = launch.values.get();
    Py_ssize_t size = PyTuple_GET_SIZE(grid) + 1 + PyTuple_GET_SIZE(constants) + addresses.size() +
        numbers.size() + PyTuple_GET_SIZE(values);
    Reference arguments = checked(PyTuple_New(size));
    Py_ssize_t next = 0;
    auto add = [&](Reference object) {
        PyTuple_SET_ITEM(arguments.get(), next++, object.release());
    };
    auto add_all = [&](PyObject *tuple) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++)
            add(Reference::to(PyTuple_GET_ITEM(tuple, i)));
    };
    add_all(grid);
    add(Reference::to(stream.get()));
    add_all(constants);
    for (const void *address : addresses)
        add(object_of(address));
    for (double number : numbers)
        add(object_of(number));
    add_all(values);
    checked(PyObject_Call(launch.function.get(), arguments.get(), nullptr));
}

bool is_watched() {
    Reference watched = checked(PyObject_CallFunctionObjArgs(triton.is_watched.get(), nullptr));
    return truth_of(watched.get());
}

/* Null if it is to be launched by Python, which may hand it over, or tell others of launches. */
std::shared_ptr<const Pass> find(const std::optional<Key> &key) {
    auto found = key ? passes.find(*key) : passes.end();
    if (found == passes.end())
        return nullptr;
    /* Before Python runs, as other threads may change then what was found. */
    auto pass = found->second;
    return is_watched() ? nullptr : pass;
}

/* Whether an activation lies in memory as NCHW or channels_last, and has values. */
bool triton_reads(const Tensor &x) {
    return x.dim() == 4 && x.layout() == at::kStrided && x.numel() &&
        (x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast));
}

Tensor in_format_of(const Tensor &x, const Tensor &other) {
    auto format = x.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
    return other.defined() ? other.contiguous(format) : other;
}

std::optional<Key> key_of_forward(
    const Tensor &x, const Tensor &added, const Layer &layer, bool relu
) {
    bool updates = layer.options.update_rate.has_value();
    const Tensor none;
    const Tensor &skipped = updates ? layer.skipped_updates : none;
    const Tensor &seen = updates ? layer.seen_elements : none;
    if (layer.options.use_batch_statistics || !triton_reads(x) ||
        (updates && !(skipped.defined() && seen.defined())))
        return {};
    for (auto table :
         {&layer.weight, &layer.bias, &layer.group_weight, &layer.group_bias, &layer.running_mean,
          &layer.running_var})
        if (!table->is_contiguous())
            return {};
    return key_of(
        FORWARD, {updates, relu}, x, layer.groups(),
        {&x, &added, &layer.weight, &layer.bias, &layer.group_weight, &layer.group_bias,
         &layer.running_mean, &layer.running_var, &skipped, &seen}
    );
}

std::optional<Output> triton_forward(
    const Tensor &x, const Tensor &residual, const Layer &layer, bool relu
) {
    Tensor added = in_format_of(x, residual);
    auto pass = find(key_of_forward(x, added, layer, relu));
    if (!pass)
        return {};
    auto updates = layer.options.update_rate.has_value();
    double rate = layer.options.update_rate.value_or(0), eps = layer.options.eps;
    Output out{at::empty_like(x), new_tables(x, layer.groups())};
    Tensor scratch = new_row(out.tables, pass->scratch);
    Stream stream(x);
    const void *flags = updates ? address(stream.flags()) : nullptr;
    const void *skipped = updates ? address(layer.skipped_updates) : nullptr;
    const void *seen = updates ? address(layer.seen_elements) : nullptr;
    const void *tables = address(out.tables), *shared = address(scratch);
    const void *mean = address(layer.running_mean), *var = address(layer.running_var);
    const void *weight = address(layer.weight), *bias = address(layer.bias);
    const void *group_weight = address(layer.group_weight), *group_bias = address(layer.group_bias);
    const Launch &moments = pass->launches.at(0), &pool = pass->launches.at(1);
    const Launch &find_tables = pass->launches.at(2), &apply = pass->launches.at(3);
    const void *used_mean = mean, *used_var = var; /* to normalize by */
    if (pool) {
        size_t row = x.size(1) * scratch.element_size();
        used_var = static_cast<const char *>(shared) + scratch.nbytes() - row;
        used_mean = static_cast<const char *>(used_var) - row;
    }
    launch(moments, stream, {address(x), shared, mean, var, flags});
    if (pool)
        launch(pool, stream, {shared, mean, var, used_mean}, {rate});
    if (find_tables)
        launch(
            find_tables, stream,
            {shared, used_mean, used_var, flags, weight, bias, group_weight, group_bias, tables},
            {rate, eps}
        );
    launch(
        apply, stream,
        {address(x), address(added), address(out.y), tables, shared, used_mean, used_var, flags,
         mean, var, skipped, seen, weight, bias, group_weight, group_bias},
        {rate, eps}
    );
    return out;
}

std::optional<Key> key_of_again(const Tensor &x, const Tensor &tables, int64_t groups, bool relu) {
    if (!triton_reads(x))
        return {};
    return key_of(AGAIN, {relu}, x, groups, {&x, &tables});
}

std::optional<Tensor> triton_again(
    const Tensor &x, const Tensor &tables, int64_t groups, bool relu
) {
    auto pass = find(key_of_again(x, tables, groups, relu));
    if (!pass)
        return {};
    Tensor y = at::empty_like(x);
    const void *none = nullptr; /* only to find out the tables, which are there */
    launch(
        pass->launches.at(0), Stream(x),
        {address(x), none, address(y), address(tables), none, none, none, none, none, none, none,
         none, none, none, none, none},
        {0, 0}
    );
    return y;
}

std::optional<Key> key_of_backward(const Tensor &grad, const Saved &saved) {
    const Tensor &x = saved.x;
    int64_t groups = saved.group_weight.numel();
    if (!triton_reads(x) || grad.sizes() != x.sizes() || !saved.weight.is_contiguous() ||
        !saved.group_weight.is_contiguous() || saved.tables.numel() != tables_size(x, groups))
        return {};
    return key_of(
        BACKWARD, {saved.relu, saved.has_residual}, x, groups,
        {&grad, &x, &saved.y, &saved.weight, &saved.group_weight, &saved.tables}
    );
}

std::optional<Gradients> triton_backward(const Tensor &given, const Saved &saved) {
    const Tensor &x = saved.x;
    Tensor grad = in_format_of(x, given);
    auto pass = find(key_of_backward(grad, saved));
    if (!pass)
        return {};
    int64_t images = x.size(0), channels = x.size(1);
    int64_t parameters = 2 * (channels + saved.group_weight.numel());
    const Launch &sum = pass->launches.at(0), &find_tables = pass->launches.at(1);
    const Launch &apply = pass->launches.at(2);
    Gradients out{
        at::empty_like(x), saved.relu && saved.has_residual ? at::empty_like(x) : Tensor(),
        new_row(saved.tables, images * parameters)
    };
    Tensor scratch = new_row(saved.tables, pass->scratch);
    Tensor coefficients = find_tables ? new_row(saved.tables, images * 2 * channels) : Tensor();
    Stream stream(x);
    const void *y = address(saved.y), *tables = address(saved.tables), *shared = address(scratch);
    const void *weight = address(saved.weight), *group_weight = address(saved.group_weight);
    const void *of_parameters = address(out.parameters), *found = address(coefficients);
    launch(sum, stream, {address(grad), address(x), y, tables, shared});
    if (find_tables)
        launch(
            find_tables, stream, {shared, weight, group_weight, tables, found, of_parameters}
        );
    launch(
        apply, stream,
        {address(grad), address(x), y, address(out.x), address(out.residual), tables, found, shared,
         weight, group_weight, of_parameters}
    );
    if (images > 1)
        out.parameters = out.parameters.view({images, parameters}).sum(0);
    return out;
}

/* ---- Filters that are standardized together, by kernels of Triton ---- */

/* What triton_backend.py finds out of them: tensors, the room of each in the results, which is all
   that it has there, the sum of these, and the number of filters. */
struct Filters {
    Tensor starts, places, eps;
    std::vector<int64_t> rooms;
    int64_t room, count;
    Launch launch;
};

using Row = std::vector<Tensor>;

/* Of the kind of launch, and all that distinguishes filters. */
using FiltersKey = std::vector<int64_t>;
auto &filters_known = *new std::unordered_map<FiltersKey, std::shared_ptr<const Filters>, Hash>();

bool is_dense(const Tensor &weight) {
    return weight.is_contiguous() || weight.is_contiguous(at::MemoryFormat::ChannelsLast);
}

/* The eps are of the forward, mean, rstd and gradients of the backward pass. */
std::optional<FiltersKey> key_of_filters(
    const Row &weights, at::ScalarType dtype, const std::vector<double> &eps, const Tensor &mean,
    const Tensor &rstd, const Row &grads
) {
    const Tensor &first = weights.at(0);
    FiltersKey key{
        static_cast<int64_t>(dtype), static_cast<int64_t>(first.scalar_type()),
        static_cast<int64_t>(first.device().type()) << 8 | (first.device().index() + 1),
        static_cast<int64_t>(eps.size())
    };
    for (const Tensor *table : {&mean, &rstd})
        key.push_back(
            table->defined() ? static_cast<int64_t>(table->scalar_type()) << 1 |
                    (reinterpret_cast<uintptr_t>(address(*table)) % 16 == 0)
                             : -1
        );
    for (size_t i = 0; i < weights.size(); i++) {
        const Tensor &weight = weights[i];
        if (weight.layout() != at::kStrided || !is_dense(weight) || !weight.numel() ||
            weight.scalar_type() != first.scalar_type() || weight.device() != first.device())
            return {};
        key.push_back(weight.size(0));
        key.push_back(weight.numel());
        if (!eps.empty()) {
            int64_t bits;
            std::memcpy(&bits, &eps.at(i), sizeof bits);
            key.push_back(bits);
            continue;
        }
        const Tensor &grad = grads.at(i);
        bool same_order = (grad.is_contiguous() && weight.is_contiguous()) ||
            grad.strides() == weight.strides();
        if (grad.sizes() != weight.sizes() || !same_order || grad.scalar_type() != dtype ||
            grad.device() != first.device())
            return {};
    }
    return key;
}

/* A tensor in the memory of another one, which autograd does not take for a view of it: they are
   changed separately. */
Tensor at_offset(
    const Tensor &other, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides
) {
    Tensor part = at::detail::make_tensor<at::TensorImpl>(
        c10::Storage(other.storage()), other.key_set(), other.dtype()
    );
    part.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
    part.unsafeGetTensorImpl()->set_storage_offset(other.storage_offset() + offset);
    return part;
}

/* In their order in memory, which of a dense tensor is that of its strides. */
Tensor concatenated(const Row &tensors) {
    Row rows;
    rows.reserve(tensors.size());
    for (const Tensor &tensor : tensors)
        rows.push_back(at_offset(tensor, 0, {tensor.numel()}, {1}));
    return at::cat(rows);
}

Row divided(const Tensor &flat, const Row &like, const std::vector<int64_t> &rooms) {
    Row parts;
    parts.reserve(like.size());
    int64_t offset = 0;
    for (size_t i = 0; i < like.size(); i++) {
        parts.push_back(at_offset(flat, offset, like[i].sizes(), like[i].strides()));
        offset += rooms.empty() ? like[i].numel() : rooms[i];
    }
    return parts;
}

std::shared_ptr<const Filters> find(const std::optional<FiltersKey> &key) {
    auto found = key ? filters_known.find(*key) : filters_known.end();
    if (found == filters_known.end())
        return nullptr;
    auto filters = found->second; /* before Python runs, as above */
    return is_watched() ? nullptr : filters;
}

/* ---- The operations, by the kernels of a backend or by its functions in Python ---- */

/* A backend in Python. Forward passes have the GIL, the others do not. */
struct Backend {
    enum Kernels { IN_PYTHON, IN_C, OF_TRITON };

    PyObject *module; /* kept for ever */
    Kernels kernels = IN_PYTHON;
    bool saves_output_of_relu = true;

    Output forward(const Tensor &x, const Tensor &residual, const Layer &layer, bool relu) const {
        std::optional<Output> out;
        if (kernels == IN_C)
            out = native_forward(x, residual, layer, relu);
        else if (kernels == OF_TRITON)
            out = triton_forward(x, residual, layer, relu);
        if (out)
            return *out;
        auto rate = layer.options.update_rate;
        Reference results = called(
            module, "batch_channel_norm_forward", x, residual, layer.weight, layer.bias,
            layer.group_weight, layer.group_bias, layer.running_mean, layer.running_var,
            layer.skipped_updates, layer.seen_elements, rate, layer.options.eps,
            layer.options.use_batch_statistics, relu, layer.options.synchronize
        );
        Items items(results.get(), 2);
        return {tensor_of(items[0]), tensor_of(items[1])};
    }

    Tensor again(const Tensor &x, const Tensor &tables, int64_t groups, bool relu) const {
        std::optional<Tensor> y;
        if (kernels == IN_C)
            y = native_again(x, tables, groups, relu);
        if (y)
            return *y;
        WithGil gil;
        if (kernels == OF_TRITON)
            y = triton_again(x, tables, groups, relu);
        if (y)
            return *y;
        Reference result = called(module, "batch_channel_norm_again", x, tables, groups, relu);
        return tensor_of(result.get());
    }

    Gradients backward(const Tensor &grad, const Saved &saved) const {
        std::optional<Gradients> out;
        if (kernels == IN_C)
            out = native_backward(grad, saved);
        if (out)
            return *out;
        WithGil gil;
        if (kernels == OF_TRITON)
            out = triton_backward(grad, saved);
        if (out)
            return *out;
        Reference results = called(
            module, "batch_channel_norm_backward", grad, saved.x, saved.y, saved.weight,
            saved.group_weight, saved.tables, saved.relu, saved.has_residual, saved.synchronize
        );
        Items items(results.get(), 3);
        return {tensor_of(items[0]), tensor_of(items[1]), tensor_of(items[2])};
    }
};

auto &backends = *new std::list<Backend>();

/* A backend, which when it is first seen says what there is of it, by its `for_extension`. */
const Backend &backend_of(PyObject *module) {
    for (const Backend &backend : backends)
        if (backend.module == module)
            return backend;
    Backend backend{module};
    Reference saves = checked(PyObject_GetAttrString(module, "SAVES_OUTPUT_OF_RELU"));
    backend.saves_output_of_relu = truth_of(saves.get());
    Reference given = called(module, "for_extension");
    Items items(given.get());
    if (items.size() && PyLong_Check(items[0])) {
        native.forward = reinterpret_cast<decltype(native.forward)>(pointer_of(items[0]));
        native.again = reinterpret_cast<decltype(native.again)>(pointer_of(items[1]));
        native.backward = reinterpret_cast<decltype(native.backward)>(pointer_of(items[2]));
        backend.kernels = Backend::IN_C;
    } else if (items.size()) {
        triton.stream_of = Reference::to(items[0]);
        triton.flags_of = Reference::to(items[1]);
        triton.is_watched = Reference::to(items[2]);
        backend.kernels = Backend::OF_TRITON;
    }
    Py_INCREF(module);
    backends.push_back(backend);
    return backends.back();
}

/* ---- Convolutions with their normalization, see branch.py ---- */

/* Of a convolution. */
struct Geometry {
    std::vector<int64_t> stride, padding, dilation;
    int64_t groups;
};

struct Link {
    Layer layer;
    /* Without filters there is no convolution, and the input is normalized. */
    Tensor filters;
    Reference again;
    Geometry geometry;
};

const std::string ONCE = "trying to differentiate twice a function that was marked with "
                         "@once_differentiable";

/* Where the gradients of a link begin among those of a branch, and of how many tensors they are. */
constexpr size_t FIRST = 2, OF_LINK = 5;

struct Backward : Node {
    struct SavedLink {
        /* x is what the convolution made; without one it is that of the node. */
        SavedVariable x, weight, group_weight, tables, filters;
        Reference again;
        Geometry geometry;
        std::array<at::ScalarType, 4> dtypes;
        bool convolves, synchronize;

        void reset() {
            for (auto variable : {&x, &weight, &group_weight, &tables, &filters})
                variable->reset_data();
        }
    };

    const Backend *backend, *named;
    SavedVariable x, y; /* y unless it can do without */
    std::vector<SavedLink> links;
    bool relu, has_residual;

    std::string name() const override {
        return links.front().convolves ? "BranchBackward" : "BatchChannelNormBackward";
    }

    /* What compiled autograd asks for; a method of const nodes in some versions, in others not. */
    void compiled_args(torch::autograd::CompiledNodeArgs &) const {
        refuse_compiled_autograd();
    }
    void compiled_args(torch::autograd::CompiledNodeArgs &) {
        refuse_compiled_autograd();
    }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        x.reset_data();
        y.reset_data();
        for (auto &link : links) {
            link.reset();
            link.again = Reference();
        }
    }

    variable_list apply(variable_list &&given) override {
        std::lock_guard<std::mutex> lock(mutex_);
        Tensor grad = std::move(given.at(0));
        if (!grad.defined()) /* zeros, for ranks that synchronize must do the same */
            grad = input_metadata(0).zeros_like();
        if (!at::GradMode::is_enabled())
            return gradients(std::move(grad));
        /* Gradients that may be differentiated, which is an error then. */
        variable_list results;
        {
            at::AutoGradMode no_grad(false);
            results = gradients(std::move(grad));
            for (auto &result : results)
                if (result.defined())
                    result = result.detach().set_requires_grad(true);
        }
        torch::autograd::DelayedError refusing(ONCE, results.size());
        return refusing.apply(std::move(results));
    }

  private:
    static void refuse_compiled_autograd() {
        TORCH_CHECK(
            false, "compiled autograd was turned on between the forward and the backward pass of "
            "BCN; turn it on before both, or set WSBCN_D2_EXTENSION=0 in the environment"
        );
    }
    variable_list gradients(Tensor grad);
};

/* A node is held by a shared_ptr, in later versions of PyTorch by an intrusive_ptr. */
using Holder = decltype(torch::autograd::Edge::function);

template <typename Class>
auto new_node(const std::shared_ptr<Node> *) {
    return std::shared_ptr<Class>(new Class(), [](Class *node) { deleteNode(node); });
}

template <typename Class>
auto new_node(const c10::intrusive_ptr<Node> *) {
    return c10::make_intrusive<Class>();
}

/* Whether something wants to see operations on these tensors, or they stand for others. */
bool is_observed(const std::vector<const Tensor *> &tensors) {
    constexpr c10::DispatchKeySet keys({
        DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::PreDispatch,
        DispatchKey::PythonDispatcher, DispatchKey::FuncTorchDynamicLayerFrontMode,
        DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::FuncTorchBatched,
        DispatchKey::FuncTorchGradWrapper, DispatchKey::Batched, DispatchKey::Tracer,
        DispatchKey::Functionalize,
    });
    auto present = c10::impl::tls_local_dispatch_key_set().included_;
    for (auto tensor : tensors)
        if (tensor->defined())
            present = present | tensor->key_set();
    return present.has_any(keys) || at::hasCallbacks();
}

/* As batch_channel_norm.parameter_gradients. */
void divide(
    Tensor all, int64_t channels, int64_t groups, const std::array<at::ScalarType, 4> &dtypes,
    Tensor *results
) {
    bool same = std::count(dtypes.begin(), dtypes.end(), dtypes[0]) == 4;
    if (same)
        all = all.to(dtypes[0]);
    auto parts = all.unsafe_split_with_sizes({channels, channels, groups, groups});
    for (size_t i = 0; i < parts.size(); i++)
        results[i] = same ? std::move(parts[i]) : parts[i].to(dtypes[i]);
}

variable_list Backward::gradients(Tensor grad) {
    c10::OptionalDeviceGuard guard(grad.device());
    const Backend &kernels = is_observed({&grad}) ? *named : *backend;
    bool keep = torch::autograd::get_current_graph_task_keep_graph();
    variable_list results(num_outputs());
    Tensor input = x.unpack(), output = y.unpack(getptr());
    if (!keep) {
        x.reset_data();
        y.reset_data();
    }
    bool relu = this->relu, has_residual = this->has_residual;
    if (has_residual && !relu)
        results[1] = grad;
    /* The saved tensors of a link: asked for only once, for activation checkpointing. */
    auto unpacked = [&](SavedLink &link) {
        Saved saved{
            link.convolves ? link.x.unpack() : input, Tensor(), link.weight.unpack(),
            link.group_weight.unpack(), link.tables.unpack(), true, false, link.synchronize
        };
        Tensor filters = link.filters.unpack();
        if (!keep)
            link.reset();
        return std::make_pair(std::move(saved), std::move(filters));
    };
    auto [saved, filters] = unpacked(links.back());
    for (size_t index = links.size(); index-- > 0;) {
        SavedLink &link = links[index];
        Tensor *of_link = &results[FIRST + OF_LINK * index];
        saved.y = std::move(output);
        saved.relu = relu;
        saved.has_residual = has_residual;
        Gradients found = kernels.backward(grad, saved);
        grad = std::move(found.x);
        if (found.residual.defined())
            results[1] = std::move(found.residual);
        divide(
            found.parameters, saved.weight.numel(), saved.group_weight.numel(), link.dtypes,
            of_link + 1
        );
        saved = Saved();
        relu = true;
        has_residual = false;
        if (!link.convolves)
            break;
        Tensor used = std::move(filters);
        if (index) {
            std::tie(saved, filters) = unpacked(links[index - 1]);
            output = kernels.again(saved.x, saved.tables, saved.group_weight.numel(), true);
        }
        if (link.again.get()) {
            WithGil gil;
            used = tensor_of(called(link.again.get(), "filters").get());
            if (!keep)
                link.again = Reference();
        }
        std::array<bool, 3> wanted{
            index || task_should_compute_output(0),
            task_should_compute_output(FIRST + OF_LINK * index), false
        };
        const Geometry &geometry = link.geometry;
        std::tie(grad, of_link[0], std::ignore) = at::convolution_backward(
            grad, index ? output : input, used, at::OptionalIntArrayRef(), geometry.stride,
            geometry.padding, geometry.dilation, false, {0, 0}, geometry.groups, wanted
        );
    }
    results[0] = std::move(grad);
    return results;
}

/* The result as an object of Python; None if it is for Python to find. Of Python come a function
   that gives the backend for a tensor, and the operations that PyTorch knows by name. */
PyObject *run(
    PyObject *kernels_for, PyObject *named, const Tensor &x, const Tensor &residual,
    std::vector<Link> &links, bool relu
) {
    TORCH_CHECK_INDEX(!links.empty(), "a branch has at least one convolution");
    std::vector<const Tensor *> tensors{&x, &residual}; /* in the order of the gradients */
    for (Link &link : links) {
        tensors.push_back(&link.filters);
        for (auto parameter : link.layer.parameters())
            tensors.push_back(parameter);
    }
    bool records = false, elsewhere = false, has_tangent = false;
    for (auto tensor : tensors)
        if (tensor->defined()) {
            records |= tensor->requires_grad();
            elsewhere |= tensor->device() != x.device();
            has_tangent |= tensor->_fw_grad(0).defined();
        }
    for (Link &link : links)
        for (auto tensor : link.layer.state())
            elsewhere |= tensor->defined() && tensor->device() != x.device();
    if (elsewhere || has_tangent || is_observed(tensors))
        Py_RETURN_NONE;
    records &= at::GradMode::is_enabled();
    Reference of_x = object_of(x);
    Reference kernels = checked(PyObject_CallFunctionObjArgs(kernels_for, of_x.get(), nullptr));
    const Backend &backend = backend_of(kernels.get());
    decltype(new_node<Backward>(static_cast<Holder *>(nullptr))) node;
    if (records) {
        node = new_node<Backward>(static_cast<Holder *>(nullptr));
        torch::autograd::edge_list edges;
        edges.reserve(tensors.size());
        for (auto tensor : tensors)
            edges.push_back(
                tensor->defined() ? torch::autograd::impl::gradient_edge(*tensor)
                                  : torch::autograd::Edge()
            );
        node->set_next_edges(std::move(edges));
    }
    Tensor y = x;
    std::vector<Tensor> normalized, tables;
    {
        at::AutoGradMode no_grad(false);
        c10::OptionalDeviceGuard guard(x.device());
        for (Link &link : links) {
            bool is_last = &link == &links.back();
            Tensor z = std::move(y);
            if (link.filters.defined()) {
                const Geometry &geometry = link.geometry;
                WithoutGil no_gil;
                z = at::conv2d(
                    z, link.filters, {}, geometry.stride, geometry.padding, geometry.dilation,
                    geometry.groups
                );
            }
            Tensor added = is_last ? residual : Tensor();
            TORCH_CHECK_VALUE(
                !added.defined() || added.sizes() == z.sizes(), "expected a residual of shape ",
                z.sizes(), ", got ", added.sizes()
            );
            Output out = backend.forward(z, added, link.layer, relu || !is_last);
            y = std::move(out.y);
            if (records) {
                normalized.push_back(std::move(z));
                tables.push_back(std::move(out.tables));
            }
        }
    }
    if (records) {
        torch::autograd::set_history(y, node);
        node->backend = &backend;
        node->named = &backend_of(named);
        node->relu = relu;
        node->has_residual = residual.defined();
        /* In the order of the functions in Python: activation checkpointing, which knows saved
           tensors by their order, may repeat in Python what was done here. */
        node->x = SavedVariable(x, false);
        if (relu && (residual.defined() || backend.saves_output_of_relu))
            node->y = SavedVariable(y, true);
        node->links.reserve(links.size());
        for (size_t i = 0; i < links.size(); i++) {
            const Layer &layer = links[i].layer;
            bool convolves = links[i].filters.defined();
            if (links[i].again.get())
                links[i].filters = Tensor();
            node->links.push_back({
                SavedVariable(convolves ? normalized[i] : Tensor(), false),
                SavedVariable(layer.weight, false),
                SavedVariable(layer.group_weight, false), SavedVariable(tables[i], false),
                SavedVariable(links[i].filters, false), std::move(links[i].again),
                std::move(links[i].geometry),
                {layer.weight.scalar_type(), layer.bias.scalar_type(),
                 layer.group_weight.scalar_type(), layer.group_bias.scalar_type()},
                convolves, layer.options.synchronize,
            });
        }
    }
    return THPVariable_Wrap(std::move(y));
}

/* ---- For Python ---- */

Layer layer_of(const Items &parameters, const Items &state, Options options) {
    return {
        tensor_of(parameters[0]), tensor_of(parameters[1]), tensor_of(parameters[2]),
        tensor_of(parameters[3]), tensor_of(state[0]), tensor_of(state[1]), tensor_of(state[2]),
        tensor_of(state[3]), options,
    };
}

Options options_of(PyObject *rate, PyObject *eps, PyObject *use_batch, PyObject *synchronize) {
    std::optional<double> update_rate;
    if (rate != Py_None)
        update_rate = number_of(rate);
    return {update_rate, number_of(eps), truth_of(use_batch), truth_of(synchronize)};
}

/* branch.Link */
Link link_of(PyObject *object) {
    Items fields(object, 9);
    Items geometry(fields[2], 4);
    return {
        layer_of(
            Items(fields[3], 4), Items(fields[4], 4),
            options_of(fields[5], fields[6], fields[7], fields[8])
        ),
        tensor_of(fields[0]),
        fields[1] == Py_None ? Reference() : Reference::to(fields[1]),
        {
            each(geometry[0], integer_of),
            each(geometry[1], integer_of),
            each(geometry[2], integer_of),
            integer_of(geometry[3]),
        },
    };
}

void expect(Py_ssize_t count, Py_ssize_t expected) {
    TORCH_CHECK_TYPE(count == expected, "expected ", expected, " arguments, got ", count);
}

PyObject *branch(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 6);
    Items items(args[2]);
    std::vector<Link> links;
    for (Py_ssize_t i = 0; i < items.size(); i++)
        links.push_back(link_of(items[i]));
    return run(
        args[0], args[1], tensor_of(args[3]), tensor_of(args[4]), links, truth_of(args[5])
    );
    END_HANDLE_TH_ERRORS
}

PyObject *batch_channel_norm(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 7);
    Items options(args[6], 5);
    std::vector<Link> links;
    links.push_back({layer_of(
        Items(args[4], 4), Items(args[5], 4),
        options_of(options[0], options[1], options[2], options[4])
    )});
    return run(
        args[0], args[1], tensor_of(args[2]), tensor_of(args[3]), links, truth_of(options[3])
    );
    END_HANDLE_TH_ERRORS
}

Launch launch_of(PyObject *object) {
    Items parts(object, 4);
    for (Py_ssize_t i = 1; i < parts.size(); i++)
        TORCH_CHECK_TYPE(PyTuple_Check(parts[i]), "expected a tuple");
    return {
        Reference::to(parts[0]), Reference::to(parts[1]), Reference::to(parts[2]),
        Reference::to(parts[3]),
    };
}

void remember(const std::optional<Key> &key, PyObject *scratch, PyObject *launches) {
    if (!key)
        return;
    Pass pass{integer_of(scratch), {}};
    Items items(launches);
    for (Py_ssize_t i = 0; i < items.size(); i++) {
        pass.launches.push_back(items[i] == Py_None ? Launch() : launch_of(items[i]));
    }
    if (passes.size() >= REMEMBERED)
        passes.clear();
    passes[*key] = std::make_shared<const Pass>(std::move(pass));
}

PyObject *remember_forward(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 7);
    Items options(args[4], 5);
    Layer layer = layer_of(
        Items(args[2], 4), Items(args[3], 4),
        options_of(options[0], options[1], options[2], options[4])
    );
    Tensor x = tensor_of(args[0]), residual = tensor_of(args[1]);
    remember(key_of_forward(x, residual, layer, truth_of(options[3])), args[5], args[6]);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

PyObject *remember_again(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 6);
    Tensor x = tensor_of(args[0]), tables = tensor_of(args[1]);
    remember(key_of_again(x, tables, integer_of(args[2]), truth_of(args[3])), args[4], args[5]);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

PyObject *remember_backward(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 10);
    Saved saved{
        tensor_of(args[1]), tensor_of(args[2]), tensor_of(args[3]), tensor_of(args[4]),
        tensor_of(args[5]), truth_of(args[6]), truth_of(args[7]), false,
    };
    remember(key_of_backward(tensor_of(args[0]), saved), args[8], args[9]);
    Py_RETURN_NONE;
    END_HANDLE_TH_ERRORS
}

Reference list_of(const Row &row) {
    Reference list = checked(PyList_New(row.size()));
    for (size_t i = 0; i < row.size(); i++)
        PyList_SET_ITEM(list.get(), i, object_of(row[i]).release());
    return list;
}

at::ScalarType dtype_of(PyObject *object) {
    TORCH_CHECK_TYPE(THPDtype_Check(object), "expected a dtype, got ", Py_TYPE(object)->tp_name);
    return reinterpret_cast<THPDtype *>(object)->scalar_type;
}

PyObject *remember_filters(
    const std::optional<FiltersKey> &key, PyObject *tensors, PyObject *rooms, PyObject *count,
    PyObject *launch
) {
    if (key) {
        Row of_filters = each(tensors, tensor_of);
        of_filters.resize(3);
        Filters filters{of_filters[0], of_filters[1], of_filters[2], each(rooms, integer_of), 0,
                        integer_of(count), launch_of(launch)};
        for (int64_t room : filters.rooms)
            filters.room += room;
        if (filters_known.size() >= REMEMBERED)
            filters_known.clear();
        filters_known[*key] = std::make_shared<const Filters>(std::move(filters));
    }
    Py_RETURN_NONE;
}

PyObject *remember_standardize(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 8);
    backend_of(args[0]);
    Row weights = each(args[1], tensor_of);
    auto key = key_of_filters(weights, dtype_of(args[3]), each(args[2], number_of), {}, {}, {});
    return remember_filters(key, args[4], args[5], args[6], args[7]);
    END_HANDLE_TH_ERRORS
}

PyObject *remember_standardize_backward(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 9);
    backend_of(args[0]);
    Row grads = each(args[1], tensor_of), weights = each(args[2], tensor_of);
    auto key = key_of_filters(
        weights, grads.at(0).scalar_type(), {}, tensor_of(args[3]), tensor_of(args[4]), grads
    );
    return remember_filters(key, args[5], args[6], args[7], args[8]);
    END_HANDLE_TH_ERRORS
}

PyObject *standardize(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 3);
    Row weights = each(args[0], tensor_of);
    at::ScalarType dtype = dtype_of(args[2]);
    auto filters = find(key_of_filters(weights, dtype, each(args[1], number_of), {}, {}, {}));
    if (!filters)
        Py_RETURN_NONE;
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    Tensor flat = concatenated(weights);
    auto compute = c10::promoteTypes(flat.scalar_type(), at::kFloat);
    Tensor out = at::empty({filters->room}, flat.options().dtype(dtype));
    Tensor tables = at::empty({2 * filters->count}, flat.options().dtype(compute));
    Tensor mean = at_offset(tables, 0, {filters->count}, {1});
    Tensor rstd = at_offset(tables, filters->count, {filters->count}, {1});
    launch(
        filters->launch, Stream(flat),
        {address(flat), address(out), address(mean), address(rstd), address(filters->starts),
         address(filters->places), address(filters->eps)}
    );
    Reference outputs = list_of(divided(out, weights, filters->rooms));
    return Py_BuildValue(
        "NNN", outputs.release(), object_of(mean).release(), object_of(rstd).release()
    );
    END_HANDLE_TH_ERRORS
}

PyObject *standardize_backward(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    expect(count, 4);
    Row grads = each(args[0], tensor_of), weights = each(args[1], tensor_of);
    Tensor mean = tensor_of(args[2]), rstd = tensor_of(args[3]);
    auto filters = find(
        key_of_filters(weights, grads.at(0).scalar_type(), {}, mean, rstd, grads)
    );
    if (!filters)
        Py_RETURN_NONE;
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    Tensor flat = concatenated(weights), grad = concatenated(grads), out = at::empty_like(flat);
    launch(
        filters->launch, Stream(flat),
        {address(grad), address(flat), address(out), address(mean), address(rstd),
         address(filters->starts)}
    );
    return list_of(divided(out, weights, {})).release();
    END_HANDLE_TH_ERRORS
}

template <typename Function>
PyMethodDef method(const char *name, Function function, const char *doc) {
    auto given = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
    return {name, given, METH_FASTCALL, doc};
}

PyMethodDef methods[] = {
    method(
        "branch", branch,
        "branch(kernels_for, named, links, x, residual, relu) -> Tensor or None"
    ),
    method(
        "batch_channel_norm", batch_channel_norm,
        "batch_channel_norm(kernels_for, named, x, residual, parameters, state, options) -> "
        "Tensor or None"
    ),
    method(
        "remember_forward", remember_forward,
        "remember_forward(x, residual, parameters, state, options, scratch, launches)"
    ),
    method(
        "remember_again", remember_again,
        "remember_again(x, tables, groups, relu, scratch, launches)"
    ),
    method(
        "remember_backward", remember_backward,
        "remember_backward(grad, x, y, weight, group_weight, tables, relu, has_residual, scratch, "
        "launches)"
    ),
    method(
        "standardize", standardize,
        "standardize(weights, eps, dtype) -> (list of Tensor, Tensor, Tensor) or None"
    ),
    method(
        "standardize_backward", standardize_backward,
        "standardize_backward(grads, weights, mean, rstd) -> list of Tensor or None"
    ),
    method(
        "remember_standardize", remember_standardize,
        "remember_standardize(kernels, weights, eps, dtype, tensors, rooms, count, launch)"
    ),
    method(
        "remember_standardize_backward", remember_standardize_backward,
        "remember_standardize_backward(kernels, grads, weights, mean, rstd, tensors, rooms, count, "
        "launch)"
    ),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "wsbcn_d2_extension", nullptr, -1, methods, nullptr, nullptr, nullptr,
    nullptr,
};

} // namespace

PyMODINIT_FUNC PyInit_wsbcn_d2_extension() {
    return PyModule_Create(&definition);
}
