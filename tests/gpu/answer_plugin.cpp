// A plugin for TensorRT 8.6 whose operator, acme::Answer, gives 42 whatever it is asked; compiled by test_plugins.py.
//
// It declares for itself what NvInferRuntimePlugin.h of 8.6 declares, function by function in that order, since a table of
// virtual functions is all that both sides share: there are no headers in TensorRT's Python packages.
#include <cstddef>
#include <cstdint>
#include <dlfcn.h>

struct Dims { int32_t count; int32_t extent[8]; };
struct DimsExprs { int32_t count; void const* extent[8]; };
struct TensorDesc { Dims dims; int32_t type; int32_t format; float scale; };
struct Fields { int32_t count; void const* fields; };
using Memset = int (*)(unsigned long long, unsigned, size_t, void*);

struct Plugin {
    // IPluginV2
    virtual int32_t getTensorRTVersion() const noexcept { return 3 << 24 | 8600; }  // 3: IPluginV2DynamicExt
    virtual char const* getPluginType() const noexcept { return "Answer"; }
    virtual char const* getPluginVersion() const noexcept { return "1"; }
    virtual int32_t getNbOutputs() const noexcept { return 1; }
    virtual Dims getOutputDimensionsOfOld(int32_t, Dims const*, int32_t) noexcept { return {-1, {}}; }
    virtual bool supportsFormat(int32_t, int32_t) const noexcept { return false; }
    virtual void configureWithFormat(Dims const*, int32_t, Dims const*, int32_t, int32_t, int32_t, int32_t) noexcept {}
    virtual int32_t initialize() noexcept { return 0; }
    virtual void terminate() noexcept {}
    virtual size_t getWorkspaceSizeOfOld(int32_t) const noexcept { return 0; }
    virtual int32_t enqueueOfOld(int32_t, void const* const*, void* const*, void*, void*) noexcept { return 1; }
    virtual size_t getSerializationSize() const noexcept { return 0; }
    virtual void serialize(void*) const noexcept {}
    virtual void destroy() noexcept { delete this; }
    virtual Plugin* clone() const noexcept { return new Plugin; }
    virtual void setPluginNamespace(char const*) noexcept {}
    virtual char const* getPluginNamespace() const noexcept { return "acme"; }
    virtual ~Plugin() noexcept = default;
    // IPluginV2Ext
    virtual int32_t getOutputDataType(int32_t, int32_t const* types, int32_t) const noexcept { return types[0]; }
    virtual bool isOutputBroadcastAcrossBatch(int32_t, bool const*, int32_t) const noexcept { return false; }
    virtual bool canBroadcastInputAcrossBatch(int32_t) const noexcept { return true; }
    virtual void configurePluginOfOld(Dims const*, int32_t, Dims const*, int32_t, int32_t const*, int32_t const*, bool const*,
        bool const*, int32_t, int32_t) noexcept {}
    virtual void attachToContext(void*, void*, void*) noexcept {}
    virtual void detachFromContext() noexcept {}
    // IPluginV2DynamicExt
    virtual DimsExprs getOutputDimensions(int32_t, DimsExprs const* inputs, int32_t, void*) noexcept { return inputs[0]; }
    virtual bool supportsFormatCombination(int32_t at, TensorDesc const* all, int32_t, int32_t) noexcept {
        return all[at].type == 0 && all[at].format == 0;  // kFLOAT, kLINEAR
    }
    virtual void configurePlugin(void const*, int32_t, void const*, int32_t) noexcept {}
    virtual size_t getWorkspaceSize(TensorDesc const*, int32_t, TensorDesc const*, int32_t) const noexcept { return 0; }
    virtual int32_t enqueue(TensorDesc const* inputs, TensorDesc const*, void const* const*, void* const* outputs, void*,
        void* stream) noexcept {
        size_t count = 1;
        for (int32_t axis = 0; axis < inputs[0].dims.count; ++axis) count *= inputs[0].dims.extent[axis];
        void* driver = dlopen("libcuda.so.1", RTLD_NOW);
        auto const fill = driver ? reinterpret_cast<Memset>(dlsym(driver, "cuMemsetD32Async")) : nullptr;
        unsigned const bits = 0x42280000;  // 42.0f
        return fill ? fill(reinterpret_cast<unsigned long long>(outputs[0]), bits, count, stream) : 1;
    }
};

struct Creator {
    virtual int32_t getTensorRTVersion() const noexcept { return 8600; }
    virtual char const* getPluginName() const noexcept { return "Answer"; }
    virtual char const* getPluginVersion() const noexcept { return "1"; }
    virtual Fields const* getFieldNames() noexcept { static Fields none{0, nullptr}; return &none; }
    virtual Plugin* createPlugin(char const*, Fields const*) noexcept { return new Plugin; }
    virtual Plugin* deserializePlugin(char const*, void const*, size_t) noexcept { return new Plugin; }
    virtual void setPluginNamespace(char const*) noexcept {}
    virtual char const* getPluginNamespace() const noexcept { return "acme"; }
    virtual ~Creator() = default;
};

struct Registry { virtual bool registerCreator(Creator& creator, char const* space) noexcept = 0; };
extern "C" Registry* getPluginRegistry() noexcept;
static Creator creator;
static bool const registered = getPluginRegistry()->registerCreator(creator, "acme");
