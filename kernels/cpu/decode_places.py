"""Where a decoded token's loops find what: places in their arrays `plan`, `at` and `numbers` and in a head's local ones, and how
kinds are numbered (decode_layer.py)."""

# Rows of a head's local arrays: over values [.,V], and over key channels [.,K].
Z, ERROR, RAW = 0, 1, 2
QUERY, READ, WRITE, DECAY, STATISTIC = 0, 1, 2, 3, 4
LINEAR, TIED = 5, 6
"""Laws beside those of decode_code.py: z itself; the gate's decay, as the statistic forgets."""
DIAGONAL, HYPERGRADIENT, INVERSE, GRAM = 1, 2, 3, 4
WRITE_SIDE, QUERY_SIDE = 1, 2
KACZMARZ, LONGHORN, LONGHORN_GATE, EFLA, SHARED = 1, 2, 3, 4, 5
"""Steps beside a law's own number: for raw keys, and the gate's time step."""
UNIT_VALUE, HEAD_VALUE, CHANNEL_VALUE = 1, 2, 3
NO_ERASE, ERASE_KEY, ERASE_HEAD, ERASE_CHANNEL = 0, 1, 2, 3
# Places in `plan`: sizes and kinds, the kinds of the four laws, and from RANK on the inner width of every product.
BATCH, TAPS, WIDTH, HEADS, KEY_HEADS, KEY, VALUE, SUBSTEPS, HIDDEN, OUTPUTS = range(10)
ERASE, FEEDBACK, VALUES, STEP_RULE, ACTIVATION, VALUE_ACTIVATION, OUTPUT_ACTIVATION = range(10, 17)
PER_CHANNEL, LAW, KIND, AWARE, SIDE, ITERATIONS, RANK = 17, 18, 22, 23, 24, 25, 26
# Places in `at`: addresses; from PRODUCTS on those of the products, PLACES each.
INPUT, PAST, STATE, OLD_STATISTIC, OUT, KEPT, NEW_STATE, NEW_STATISTIC = range(8)
TAP_WEIGHT, NORM, CENTRE, READ_SCALE, FEEDBACK_SCALE, VALUE_SCALE, SKIP, RIDGE = range(8, 16)
INPUT_NORM, MLP_NORM, NEXT_NORM, PRODUCTS = range(16, 20)
MIXED, GATE, STEP, FORGET, GAIN, READ_GATE, VALUE_GATE, OUTPUT_GATE, OUTPUT, UP, DOWN, LATER_STEPS = range(12)
Z_AT, WEIGHT_AT, BIAS_AT, A_AT, INNER_AT, PLACES = range(6)
# Places in `numbers`; every law has its (low, high) from RANGES on.
SCALE, LOWEST, EPS_Q, EPS_K, EPS_O, EPS_STEP, EPS_VALUE, EPS_NORM, EPS_NEXT = range(9)
ETA, BOX_LOW, BOX_HIGH, LOG_X, LIMIT, FLOOR, RANGES = range(9, 16)
