"""Every float tolerance of the tests, each with its reason. Integers, codes and stored scales are compared exactly."""

# x / scale is rounded to float32: at most 255 steps of 2^-24 each, so a rounding point is met 2^-16 of a step early.
HALF_STEP = 0.5 + 2.0**-16

# Sums of a few hundred float32 terms taken in another order (about sqrt(K) roundings of 2^-24 each).
FLOAT32_SUM = 2e-6

# Share of the sum of magnitudes: weights rounded to bfloat16 (2^-9), the sum kept in float32, the result rounded.
BFLOAT16_MATMUL = 2.0**-8

# Float64 models: what is left after roundings of 2^-53, far from any step of a grid.
FLOAT64_MODEL = 1e-6

# Integer against float arithmetic of int8 inputs, share of the largest logit: sums differ by FLOAT32_SUM in a layer,
# which now and then moves an input of the next layer to the neighbouring code, one part in 127 of one value.
FLIPPED_INPUT_CODES = 5e-3
