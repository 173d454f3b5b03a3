// Which kernels a library holds: the build gives the values, the loader asks for them before anything else.
#define FOVEATE_EXPORT extern "C" __attribute__((visibility("default")))

FOVEATE_EXPORT int foveate_abi(void) { return FOVEATE_ABI; }
FOVEATE_EXPORT const char* foveate_isa(void) { return FOVEATE_ISA_NAME; }
FOVEATE_EXPORT const char* foveate_source_hash(void) { return FOVEATE_SOURCE_HASH; }
