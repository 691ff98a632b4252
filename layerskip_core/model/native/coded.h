/* bf16 weights in 12 bits, without loss: the low byte as it is, and a code of 4 bits for the high byte (the sign and seven bits of
 * the exponent), of which a panel has few: 16 are coded. The few weights with another high byte are exceptions.
 *
 * Two units of a panel, of two inputs each, take CODED_BYTES: 64 low bytes of each unit, then 64 bytes with the codes of the first
 * unit in their low halves and those of the second in their high halves. Bytes stand in the order in which i_interleaved takes
 * them, so a unit becomes the two vectors of a bf16 panel by one look-up and two interleaves.
 *
 * Matrix.high has 16 high bytes by panel. Matrix.exceptions has `place << 16 | bits` of each exception, ascending, where the place
 * is that of the weight in the bf16 panels of the matrix; the last one's place is their end, so that no search passes it.
 *
 * A matrix is in 12 bits or stays bf16 as a whole (see matrix.py): of 27,000 panels of SmolLM2 and Qwen2.5-Coder the worst has 1
 * exception in 900 weights, and only random bits have so many that 16 bits are as fast.
 */
#define CODED_UNITS 2
#define CODED_BYTES 192

INLINE size_t coded_at(int unit) { return (size_t)(unit / CODED_UNITS) * CODED_BYTES; }
INLINE size_t coded_bytes(const Matrix *m) { return coded_at(m->inputs / 2); } /* of a panel */

/* Units from..to-1 of a panel: in bf16 or, with `in_parts`, in the form in which rows multiply them, BF16_PARTS units for each.
 * `next`: the first exception at or after them; returns the first after them. */
INLINE const int64_t *decode(const Matrix *m, int panel, int from, int to, const int64_t *next, char *out, const int in_parts) {
    const char *w = (const char *)m->weight + (size_t)panel * coded_bytes(m) + coded_at(from);
    const int8_t *high = m->high + 16 * (size_t)panel;
    const int parts = in_parts ? BF16_PARTS : 1;
    char *unit = out;
    for (int pair = from; pair < to; pair += CODED_UNITS, w += CODED_BYTES) {
        for (int line = 0; !in_parts && line < CODED_BYTES; line += 64) fetch_line_later(w + SYSTEM_PAGE + line);
        vi codes = i_load(w + 2 * 64);
        for (int u = 0; u < CODED_UNITS; u++, unit += parts * UNIT) {
            vi lows = i_load(w + 64 * u), highs = i_lookup(high, codes, u);
            for (int half = 0; half < 2; half++) {
                vi weights = i_interleaved(lows, highs, half);
                if (!in_parts) i_store(unit + 64 * half, weights);
                for (int part = 0; in_parts && part < parts; part++) bf16_store(unit + part * UNIT + 64 * half, bf16_part(weights, part));
            }
        }
    }
    int64_t first = (int64_t)panel * PANEL * m->inputs + from * 2 * PANEL, end = first + (to - from) * 2 * PANEL;
    for (; *next >> 16 < end; next++) {
        size_t place = (size_t)((*next >> 16) - first), pair = place / (2 * PANEL), output = place / 2 % PANEL;
        if (parts == 2) place = 2 * ((2 * pair + place % 2) * PANEL + output) + 1; /* the upper half of an fp32 */
        uint16_t bits = (uint16_t)*next;
        memcpy(out + 2 * place, &bits, 2);
    }
    return next;
}
