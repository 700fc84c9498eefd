/* GPTQ's inner loop (quant/gptq.py): round a group of a weight's columns one after another, and feed the error of
   each into those of the group that are still to round.

   Transposed and in rounding order: weight, scales, codes and errors are (group, outputs), an input column each.
   `factor` is the group's part of the upper triangular U, whose rows lie `stride` apart. Outputs are independent,
   so each thread takes a strip of them that stays in the processor's cache. */

#define STRIP 64

void round_group(float *weight, const float *scales, const float *factor, const float *values,
                 unsigned char *codes, float *errors, long group, long outputs, long stride) {
    float middle[15];
    for (int i = 0; i < 15; i++)
        middle[i] = (values[i] + values[i + 1]) / 2;
#pragma omp parallel for schedule(static)
    for (long start = 0; start < outputs; start += STRIP) {
        long width = outputs - start < STRIP ? outputs - start : STRIP;
        for (long j = 0; j < group; j++) {
            float *row = weight + j * outputs + start, *error = errors + j * outputs + start;
            const float *scale = scales + j * outputs + start, *u = factor + j * stride;
            for (long o = 0; o < width; o++) {
                float relative = row[o] / scale[o];
                int code = 0;
                for (int i = 0; i < 15; i++)
                    code += relative > middle[i];
                codes[j * outputs + start + o] = (unsigned char)code;
                error[o] = (row[o] - values[code] * scale[o]) / u[j];
            }
            for (long k = j + 1; k < group; k++) {
                float *later = weight + k * outputs + start;
                for (long o = 0; o < width; o++)
                    later[o] -= u[k] * error[o];
            }
        }
    }
}
