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

# C++ integer kernels: int32 sums are exact; scaling them takes one fused multiply-add per group where the reference
# rounds twice. Relative to the sum of magnitudes.
CPU_INTEGER_INPUTS = 2e-6 + 1 / 127  # an input on a rounding tie may take the neighbouring code
# float inputs as two int8 planes: the rest after both is at most 1 / (2 * 127 * 254) of the row's largest input
CPU_FLOAT_INPUTS = 2**-15

# Engine against transformers in float32 on the same packed weights: a bfloat16 cache rounds keys and values (2^-9),
# int8 inputs on a tie may take the neighbouring code, and sums run in another order. Relative to the largest logit.
ENGINE_LOGITS = 0.03

# The chunked loss against the textbook one in float32: the same sums of a few dozen terms in another order.
FLOAT32_LOSS = {"rtol": 1e-5, "atol": 1e-6}

# The same under autocast: bfloat16 holds 8 bits, so logits of a few units are off by up to 2^-7 each.
BFLOAT16_LOSS = {"rtol": 3e-2, "atol": 3e-3}

# Share by which a packed perplexity may leave the trained one: the limit of the run's own verdict.
PERPLEXITY = 1e-3

# Scale of a rounded row: a sum of squares or an exponential in another order or polynomial, float32 (2^-24 each).
ROW_SCALE = 1e-5

# Attention: queries as two int8 planes (2^-15 of the largest), an exponential with relative error 2e-7, 300 shares.
CPU_ATTENTION = {"rtol": 1e-3, "atol": 2e-4}

# Sums of gradients over two half batches in float32 against one sum over the whole batch: a few roundings of 2^-24
# relative to the largest term. AdamW divides small gradients by their own size, so a weight whose gradient is noise may
# step either way: less than the learning rate of 5e-3, and rarely.
TWO_PROCESSES_LOSS = {"rtol": 1e-3, "atol": 0.0}
TWO_PROCESSES_MEAN, TWO_PROCESSES_LARGEST = 1e-4, 2e-3
# ... and a weight that moved so may cross to the next code: at 8 bits a step of the grid is about 5e-4 here.
TWO_PROCESSES_CODES = 0.02
