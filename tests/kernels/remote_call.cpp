// Calls a function on memory that another process sends, so that kernels for another processor run in an emulator:
//
//   remote_call LIBRARY FUNCTION < request > answer
//
// A request is 64-bit numbers and bytes: the number of regions; of each its address and size in the other process,
// and its content; the number of pointers, and where each lies; where the function's only argument lies. The answer
// is what the function returned, and every region's content.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Region {
    uint64_t address, size;
    char* content;
};

struct Pointer {
    uint64_t *place, value;
};

static void need(bool fine, const char* what) {
    if (fine) return;
    std::fprintf(stderr, "remote_call: %s\n", what);
    std::exit(1);
}

static uint64_t read_number() {
    uint64_t number;
    need(std::fread(&number, sizeof number, 1, stdin) == 1, "the request ends early");
    return number;
}

static Region read_region() {
    Region region;
    region.address = read_number();
    region.size = read_number();
    region.content = (char*)std::aligned_alloc(4096, (region.size + 4095) / 4096 * 4096);
    need(region.content, "no memory");
    need(std::fread(region.content, 1, region.size, stdin) == region.size, "a region ends early");
    return region;
}

static char* here(const std::vector<Region>& regions, uint64_t address) {
    for (const Region& region : regions)
        if (address >= region.address && address < region.address + region.size)
            return region.content + (address - region.address);
    need(false, "an address lies in no region");
    return nullptr;
}

int main(int count, char** arguments) {
    need(count == 3, "usage: remote_call LIBRARY FUNCTION");
    void* library = dlopen(arguments[1], RTLD_NOW);
    need(library, library ? "" : dlerror());
    auto* function = (int64_t(*)(void*))dlsym(library, arguments[2]);
    need(function, "the library has no such function");
    std::vector<Region> regions;
    for (uint64_t left = read_number(); left > 0; --left) regions.push_back(read_region());
    std::vector<Pointer> pointers(read_number());
    for (Pointer& pointer : pointers) {
        pointer.place = (uint64_t*)here(regions, read_number());
        pointer.value = *pointer.place;
    }
    for (const Pointer& pointer : pointers) *pointer.place = (uint64_t)here(regions, pointer.value);
    const int64_t returned = function(here(regions, read_number()));
    for (const Pointer& pointer : pointers) *pointer.place = pointer.value;
    std::fwrite(&returned, sizeof returned, 1, stdout);
    for (const Region& region : regions) std::fwrite(region.content, 1, region.size, stdout);
    return std::fflush(stdout) != 0;
}
