// A pattern from whole numbers, an operation before what it applies to: foveate/patterns/select/program.py writes them.
#pragma once
#include "placed_patterns.h"
#include "static_patterns.h"
#include "table_patterns.h"

namespace foveate::selection {

enum Operation : int64_t {
    ALL, ANY, NOT, PER_HEAD, BAND, STRIDED, SINKS, PREFIX, BLOCKS, POWER_OF_TWO, DOCUMENTS, GLOBAL_TOKENS,
    RANDOM_BLOCKS, COLUMNS, DISTANCES, BLOCK_TABLE, MOVED, PLACED, LOCAL_BLOCKS, EVERY_BLOCK, CHUNK_TABLE,
};

class Program {
  public:
    explicit Program(const int64_t* code) : next_(code) {}

    // Braces evaluate from left to right, where the order of a call's arguments is anyone's.
    std::unique_ptr<Pattern> pattern() {
        switch ((Operation)number()) {
            case ALL: return made(All{parts()});
            case ANY: return made(Any{parts()});
            case NOT: return made(Not{pattern()});
            case PER_HEAD: return made(PerHead{parts()});
            case BAND: return made(Band{number(), number()});
            case STRIDED: return made(Strided{number(), number()});
            case SINKS: return made(Prefix{number(), true});
            case PREFIX: return made(Prefix{number(), false});
            case BLOCKS: return made(SameGroup<EqualBlocks>{EqualBlocks{number()}});
            case POWER_OF_TWO: return made(PowerOfTwo{number()});
            case LOCAL_BLOCKS: return made(LocalBlocks{number(), number()});
            case EVERY_BLOCK: return made(EveryBlock{number(), number(), number()});
            case DOCUMENTS: return made(SameGroup<Documents>{Documents{table<int64_t>(), number()}});
            case GLOBAL_TOKENS: return made(GlobalTokens{table<int64_t>(), number()});
            case RANDOM_BLOCKS: return made(RandomBlocks{number(), number(), number()});
            case COLUMNS: return made(Columns{line()});
            case DISTANCES: return made(Distances{line()});
            case BLOCK_TABLE: return made(BlockTable{table<uint64_t>(), block_shape()});
            case CHUNK_TABLE: return made(ChunkTable{table<int64_t>(), table<int64_t>(), table<int64_t>(), chunk_shape()});
            case MOVED: return made(Moved{number(), number(), pattern()});
            case PLACED: return made(Placed{places(), placed_parts()});
        }
        return nullptr;
    }

  private:
    template <class Made> static std::unique_ptr<Pattern> made(Made pattern) {
        return std::make_unique<Made>(std::move(pattern));
    }
    int64_t number() { return *next_++; }
    template <class T> const T* table() { return (const T*)number(); }
    Plane plane() { return Plane{number(), number()}; }
    Line line() { return Line{table<uint8_t>(), table<int64_t>(), plane(), number()}; }
    BlockTable::Shape block_shape() {
        return {plane(), number(), number(), number(), number(), number(), number()};
    }
    ChunkTable::Shape chunk_shape() { return {plane(), number(), number(), number(), number()}; }
    Placed::Tables places() {
        return {table<int64_t>(), table<int64_t>(), table<int64_t>(), table<int64_t>(), number(), number()};
    }
    std::vector<Placed::Part> placed_parts() {
        std::vector<Placed::Part> parts(number());
        for (auto& part : parts) part = Placed::Part{number(), number(), pattern()};
        return parts;
    }
    Parts parts() {
        Parts parts(number());
        for (auto& part : parts) part = pattern();
        return parts;
    }

    const int64_t* next_;
};

}  // namespace foveate::selection
