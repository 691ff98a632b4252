/* Gumbel noise for sampling, a function of key and token id: the same as in model/noise.py.
 *
 * Plain C, which compilers vectorise: without contraction (see setup.py) each number is rounded alone, so it does not depend on
 * where a row is cut.
 */

typedef struct {
    float *scores;        /* (row, column): logits, from which the largest of each row is subtracted, and noise added */
    float *most;          /* (row): scratch */
    const uint64_t *keys; /* by row */
    const int64_t *ids;   /* token id of each column, or with of_row (row, column); NULL where they are equal */
    int32_t of_row, rows, columns;
    float temperature; /* factor of the noise */
} Perturbation;

INLINE uint32_t mixed_id(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* The logarithm of a positive normal number, within two units in the last place (Cephes' logf). */
INLINE float log_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits -= 0x3f3504f3; /* of the root of 1/2: the rest has an exponent of 0 in [root of 1/2, root of 2) */
    float k = (float)((int32_t)bits >> 23);
    bits = (bits & 0x7fffff) + 0x3f3504f3;
    memcpy(&x, &bits, 4);
    x -= 1;
    float p = 7.0376836292e-2f, square = x * x;
    p = p * x - 1.1514610310e-1f;
    p = p * x + 1.1676998740e-1f;
    p = p * x - 1.2420140846e-1f;
    p = p * x + 1.4249322787e-1f;
    p = p * x - 1.6668057665e-1f;
    p = p * x + 2.0000714765e-1f;
    p = p * x - 2.4999993993e-1f;
    p = p * x + 3.3333331174e-1f;
    p = p * x * square - k * 2.12194440e-4f - 0.5f * square;
    return x + p + k * 0.693359375f;
}

INLINE float gumbel(uint32_t id, uint32_t low, uint32_t high) {
    uint32_t bits = mixed_id(id) ^ low;
    bits = (bits ^ (bits >> 16)) * 0x7feb352du;
    bits = ((bits ^ (bits >> 15)) + high) * 0x846ca68bu;
    int32_t number = (int32_t)((bits ^ (bits >> 16)) & 0x7fffffff);
    number = number < 0x7fffffbf ? number : 0x7fffffbf; /* fp32 rounds larger ones to 2^31 */
    float uniform = ((float)number + 0.5f) * 0x1p-31f;
    float rest = 1 - uniform, lost = uniform - (1 - rest); /* -log(1 - uniform) is -log(rest - lost) */
    return -log_of(lost / rest - log_of(rest));
}

/* Adds noise to n scores of one row, the first of them of column `first`. */
static void add_noise(const Perturbation *of, int row, int first, int n) {
    float *x = of->scores + (size_t)row * (size_t)of->columns + first, most = of->most[row], temperature = of->temperature;
    uint32_t low = (uint32_t)of->keys[row], high = (uint32_t)(of->keys[row] >> 32);
    const int64_t *ids = of->ids ? of->ids + (of->of_row ? (size_t)row * (size_t)of->columns : 0) + first : NULL;
    if (ids)
        for (int i = 0; i < n; i++) x[i] = (x[i] - most) + temperature * gumbel((uint32_t)ids[i], low, high);
    else
        for (int i = 0; i < n; i++) x[i] = (x[i] - most) + temperature * gumbel((uint32_t)(first + i), low, high);
}

/* All rows, shared by threads, which leave together. */
static void perturb(const Perturbation *of, Team *team, int thread, int threads) {
    int last = share(of->rows, thread + 1, threads);
    for (int r = share(of->rows, thread, threads); r < last; r++) {
        const float *x = of->scores + (size_t)r * (size_t)of->columns;
        of->most[r] = x[largest_of(x, of->columns)];
    }
    barrier(team, threads);
    int first = share(of->columns, thread, threads), stop = share(of->columns, thread + 1, threads);
    for (int r = 0; r < of->rows; r++) add_noise(of, r, first, stop - first);
    barrier(team, threads);
}
