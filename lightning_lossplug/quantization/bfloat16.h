// Float32 and bfloat16 alike, as float32.

#pragma once

#include <cstdint>
#include <cstring>

static inline float single(float value) { return value; }

static inline float single(uint16_t half) {  // bfloat16
    uint32_t bits = (uint32_t)half << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline void narrow(float value, float *to) { *to = value; }

static inline void narrow(float value, uint16_t *to) {  // to nearest, ties to even; NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *to = (uint16_t)(value == value ? rounded : bits >> 16 | 64);
}
