// On how many threads calls ran.
#include "threads.h"

#include <utility>

#include "abi.h"

// The most threads that a part of this thread's calls has run on since it asked last; 0 where it made none.
FOVEATE_API int64_t foveate_threads_used(void) { return std::exchange(foveate::threads_used, 0); }
