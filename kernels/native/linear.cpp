// `x @ weight.T + bias` over a weight packed in panels, for one row as for many.
#include "tile.h"

// Rows whose inputs stay in a core's cache while the panels pass by: a multiple of every MOST_ROWS.
static const int64_t ROWS_AT_ONCE = 96;

extern "C" int64_t pando_panel() { return PANEL; }

// `x[rows, depth]` (row stride `x_stride`) by `panels[columns / PANEL][depth][PANEL]`, padded with zeros past `columns`.
extern "C" void pando_linear(const float *x, int64_t x_stride, const float *panels, const float *bias, float *out,
                             int64_t rows, int64_t columns, int64_t depth, int64_t threads) {
    const int64_t num_panels = (columns + PANEL - 1) / PANEL;
    const int64_t groups = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        for (int64_t panel = 0; panel < num_panels; panel++) {
            const int64_t first = group * ROWS_AT_ONCE, column = panel * PANEL;
            const int64_t some = rows - first < ROWS_AT_ONCE ? rows - first : ROWS_AT_ONCE;
            const int64_t width = columns - column < PANEL ? columns - column : PANEL;
            const float *from = x + first * x_stride, *b = panels + column * depth;
            float *into = out + first * columns + column;
            if (width == PANEL) {
                tiles(some, from, x_stride, b, PANEL, depth, into, columns, nullptr);
            } else {
                float whole[ROWS_AT_ONCE * PANEL];
                tiles(some, from, x_stride, b, PANEL, depth, whole, PANEL, nullptr);
                for (int64_t row = 0; row < some; row++)
                    memcpy(into + row * columns, whole + row * PANEL, width * sizeof(float));
            }
            if (bias)
                for (int64_t row = 0; row < some; row++)
                    for (int64_t c = 0; c < width; c++) into[row * columns + c] += bias[column + c];
        }
    }
}
