// e^x right to an ulp, and near 0 to half of one, for factors that are applied over and over: their errors would add up.
#pragma once
#include "simd.h"

namespace foveate {

// e^x = scale (1 + rest), scale a power of two, rest in [-0.3, 0.42] with a relative error of 1e-7 and all its digits
// near 0: what 1 + rest would round away.
struct Factor {
    Floats scale, rest;
};

#if defined(__AVX512F__)
FOVEATE_INLINE Floats rounded(Floats x) {
    return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FOVEATE_INLINE Floats power_of_two(Floats whole) { return (Floats)_mm512_scalef_ps((__m512)all(1.0f), (__m512)whole); }
#else
FOVEATE_INLINE Floats rounded(Floats x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    return (x + magic) - magic;
}
FOVEATE_INLINE Floats power_of_two(Floats whole) {
    return (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
}
#endif

// e^r - 1 for |r| <= ln(2) / 2, with r itself kept whole.
FOVEATE_INLINE Floats expm1_near_zero(Floats r) {
    Floats p = r * 0x1.6db444p-10f + 0x1.123b68p-7f;
    p = p * r + 0x1.55545ep-5f;
    p = p * r + 0x1.55548ep-3f;
    p = p * r + 0.5f;
    return r * r * p + r;
}

// For x <= 0, -inf included; below -86.6, where e^x is 2.5e-38, the factor is 0.
FOVEATE_INLINE Factor factor_of(Floats x) {
    const Ints gone = x < -86.6f;
    const Floats bounded = greater(all(-86.6f), x), whole = rounded(bounded * LOG2E);
    const Floats rest = expm1_near_zero(bounded - whole * LN2);
    return {gone ? Floats{} : power_of_two(whole), rest};
}

// Any x: 0 where e^x is below 2.5e-38, inf where it is above all numbers, NaN for NaN.
FOVEATE_INLINE Floats exp_of(Floats x) {
    const Ints gone = x < -86.6f;
    const Floats bounded = lesser(all(89.0f), greater(all(-86.6f), x)), whole = rounded(bounded * LOG2E);
    const Floats high = bounded - whole * 0x1.62e4p-1f, rest = expm1_near_zero(high - whole * 0x1.7f7d1cp-20f);
    const Floats half = power_of_two(whole - 1.0f);  // 2^128 is none of the numbers
    return gone ? Floats{} : (rest + 1.0f) * half * 2.0f;
}

}  // namespace foveate
