// The recursion and the few dense loops of the op, written once with GCC vector extensions and compiled once for every
// instruction set (recursion_*.cpp). `dispatch.h` declares what is built here.
//
// Include nothing that defines inline functions with external linkage: the linker could keep the copy that was compiled
// for the newest instruction set and run it on a machine without it.
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace gak {
namespace GAK_ISA {
namespace {

constexpr int kWidth = GAK_VECTOR_BYTES / 8;
// Two vectors at a time hide the latency of the chain along a row.
constexpr int kUnroll = 2;
constexpr int kLanes = kWidth * kUnroll;

typedef double Vec __attribute__((vector_size(GAK_VECTOR_BYTES)));
typedef int64_t Int __attribute__((vector_size(GAK_VECTOR_BYTES)));
typedef uint64_t Bits __attribute__((vector_size(GAK_VECTOR_BYTES)));

template <typename T>
struct Narrow;
template <>
struct Narrow<float> {
  typedef float type __attribute__((vector_size(GAK_VECTOR_BYTES / 2)));
};
template <>
struct Narrow<double> {
  typedef Vec type;
};

// A cell that no alignment reaches.
constexpr int64_t kNever = -(int64_t(1) << 40);
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the rounded integer in the low bits

#define GAK_INLINE __attribute__((always_inline)) inline

GAK_INLINE Vec splat(double value) {
  return value - Vec{};
}

GAK_INLINE Vec power_of_two(Int exponent) {
  return (Vec)((Bits)(exponent + 1023) << 52);
}

// 2^(x * scale) = mantissa * 2^n for x * scale <= 0, the mantissa within a factor of sqrt(2) of 1; the low bits of
// `shifted` hold n. float inputs carry an error of 6e-8 themselves, so a shorter polynomial (2.3e-10) does for them.
template <typename T>
GAK_INLINE Vec exp2_parts(Vec x, Vec scale, Vec& shifted) {
  shifted = x * scale + kRound;
  const Vec f = x * scale - (shifted - kRound), f2 = f * f;
  if constexpr (sizeof(T) == 4) {
    // The least largest relative error on [-1/2, 1/2] among those that are 1 at 0.
    const Vec top = f * 1.33598319986768234e-05 + 1.54613676572187586e-04;
    const Vec upper = f * 1.33419510023690054e-03 + 9.61805691935025486e-03;
    const Vec middle = f * 5.55040037531505445e-02 + 2.40226509207826866e-01;
    return (f * 6.93147183816867671e-01 + 1.0) + f2 * (middle + f2 * (upper + f2 * top));
  } else {
    constexpr double l = 0.693147180559945309;
    constexpr double l2 = l * l / 2, l3 = l2 * l / 3, l4 = l3 * l / 4, l5 = l4 * l / 5, l6 = l5 * l / 6, l7 = l6 * l / 7;
    constexpr double l8 = l7 * l / 8, l9 = l8 * l / 9, l10 = l9 * l / 10, l11 = l10 * l / 11, l12 = l11 * l / 12;
    constexpr double l13 = l12 * l / 13;
    const Vec f4 = f2 * f2;
    const Vec low = (f * l + 1.0) + f2 * (f * l3 + l2), middle = (f * l5 + l4) + f2 * (f * l7 + l6);
    const Vec upper = (f * l9 + l8) + f2 * (f * l11 + l10), top = f * l13 + l12;
    return low + f4 * (middle + f4 * (upper + f4 * top));
  }
}

template <typename T>
GAK_INLINE Vec widened(typename Narrow<T>::type values) {
#ifdef GAK_WIDEN
  // One instruction, where GCC 12 takes one half through memory.
  if constexpr (sizeof(T) == 4) {
    return GAK_WIDEN(values);
  }
#endif
  return __builtin_convertvector(values, Vec);
}

template <typename T>
GAK_INLINE Vec gather(const T* row, const int32_t* index) {
  // Spelled out, because element by element the compiler goes through memory.
  typename Narrow<T>::type values;
  if constexpr (kWidth == 2) {
    values = typename Narrow<T>::type{row[index[0]], row[index[1]]};
  } else if constexpr (kWidth == 4) {
    values = typename Narrow<T>::type{row[index[0]], row[index[1]], row[index[2]], row[index[3]]};
  } else {
    values = typename Narrow<T>::type{row[index[0]], row[index[1]], row[index[2]], row[index[3]],
                                      row[index[4]], row[index[5]], row[index[6]], row[index[7]]};
  }
  return widened<T>(values);
}

// One cell with an exponent of its own, so that nothing is lost whatever the bandwidth and the length.
struct Cell {
  Vec mantissa;
  Int exponent;
};

GAK_INLINE Int larger(Int a, Int b) {
  return a > b ? a : b;
}

GAK_INLINE Vec aligned(const Cell& cell, Int exponent) {
  const Int shift = cell.exponent - exponent;
  const Int lowest = Int{} - 1022;
  return cell.mantissa * power_of_two(larger(shift, lowest));
}

// s = exp(-phi / 2 sigma^2) and k = s / (2 - s) in extended form.
template <typename T>
GAK_INLINE Cell local_kernel(Vec x, Vec scale, Vec& s) {
  Cell k;
  Vec shifted;
  const Vec p = exp2_parts<T>(x, scale, shifted);
  k.exponent = (Int)shifted - (Int)splat(kRound);
  const Int lowest = Int{} - 1000;
  s = p * power_of_two(larger(k.exponent, lowest));
  k.mantissa = p / (2.0 - s);
  return k;
}

GAK_INLINE Cell product(Vec sum, Int exponent, const Cell& k) {
  const Vec value = sum * k.mantissa;
  const Int own = (Int)((Bits)value >> 52) - 1023;
  const Int one = (Int)(Bits{} + 0x3ff0000000000000ull);
  return {(Vec)(((Int)value & 0x000fffffffffffffll) | one), exponent + k.exponent + own};
}

// log_of of dispatch.h, for a whole vector of positive normal numbers.
GAK_INLINE Vec log_parts(Vec value, Int exponent) {
  const Bits bits = (Bits)value;
  const Bits low = bits & 0x000fffffffffffffull;
  // Mantissas from sqrt(2) on go with the next power of two.
  const Int above = low > (Bits{} + 0x6a09e667f3bcdull);  // -1 where true
  const Vec m = (Vec)(low | ((Bits{} + 0x3ff0000000000000ull) - ((Bits)above & (Bits{} + 0x0010000000000000ull))));
  const Int whole = exponent + (Int)(bits >> 52) - 1023 - above;
  const Vec f = (m - 1.0) / (m + 1.0), square = f * f;
  Vec series = splat(1.0 / 21);
  for (int k = 19; k > 0; k -= 2) {
    series = series * square + 1.0 / k;
  }
  return 2.0 * f * series + __builtin_convertvector(whole, Vec) * 0.6931471805599453;
}

template <typename T>
struct Group {
  Tile<T> tile;
  int64_t column[kLanes];
  int64_t length[kLanes];
  Vec scale[kUnroll];  // exp(-phi / 2 sigma^2) = 2^(phi * scale)
  int64_t longest = 0;
  int32_t* index;  // (longest, kLanes): where a row holds the cells of a step; a shorter lane repeats its last one

  // Lanes beyond `count` repeat the last pair. What is left of the workspace begins at `rest`.
  GAK_INLINE Group(const Tile<T>& tile, const Lane* lanes, int64_t count, void* workspace) : tile(tile) {
    typedef int32_t Places __attribute__((vector_size(4 * kLanes)));
    Places at, last;
    for (int l = 0; l < kLanes; ++l) {
      const Lane& lane = lanes[l < count ? l : count - 1];
      column[l] = lane.column;
      length[l] = lane.length;
      scale[l / kWidth][l % kWidth] = -1.44269504088896341 * lane.scale;
      longest = lane.length > longest ? lane.length : longest;
      at[l] = int32_t(lane.column);
      last[l] = int32_t(lane.column + lane.length - 1);
    }
    index = static_cast<int32_t*>(workspace);
    int32_t* to = index;
    for (int64_t j = 0; j < longest; ++j, to += kLanes) {
      __builtin_memcpy(to, &at, sizeof(at));
      if (tile.columns) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          to[l] = tile.columns[to[l]];
        }
      }
      at -= at < last;
    }
  }

  void* rest() const {
    return index + (longest + 1) * kLanes;
  }

  GAK_INLINE const T* row(int64_t i) const {
    return tile.data + (tile.rows ? tile.rows[i] : i) * tile.stride;
  }

  GAK_INLINE Vec distances(const T* cells, int64_t j, int u) const {
    return gather(cells, index + j * kLanes + u * kWidth);
  }
};

template <typename T>
void plain(int64_t n, const Group<T>& group, Vec* row) {
  const int64_t m = group.longest;
  for (int64_t c = 0; c < (m + 1) * kUnroll; ++c) {
    row[c] = Vec{};
  }
  for (int u = 0; u < kUnroll; ++u) {
    row[u] = splat(1.0);
  }
  for (int64_t i = 0; i < n; ++i) {
    const T* cells = group.row(i);
    for (int l = 0; l < kLanes && i + 2 < n; ++l) {
      // Rows are far apart and short: the hardware does not guess the next one.
      __builtin_prefetch(group.row(i + 2) + group.index[l]);
    }
    Vec left[kUnroll], corner[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      left[u] = Vec{};
      corner[u] = row[u];
      row[u] = Vec{};
    }
    for (int64_t j = 0; j < m; ++j) {
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) {
        Vec shifted;
        const Vec p = exp2_parts<T>(group.distances(cells, j, u), group.scale[u], shifted);
        // kRound leaves no bit behind.
        const Vec s = (Vec)((Bits)p + ((Bits)shifted << 52));
        const Vec up = row[(j + 1) * kUnroll + u];
        // Left and up first: the sum is then the same, bit for bit, when the two sequences change places.
        const Vec value = ((left[u] + up) + corner[u]) * (s / (2.0 - s));
        corner[u] = up;
        left[u] = value;
        row[(j + 1) * kUnroll + u] = value;
      }
    }
  }
}

// What stands above the first row.
GAK_INLINE void begin(Cell* row, int64_t m) {
  for (int64_t c = 0; c < (m + 1) * kUnroll; ++c) {
    row[c] = {Vec{}, Int{} + kNever};
  }
  for (int u = 0; u < kUnroll; ++u) {
    row[u] = {splat(1.0), Int{}};
  }
}

// Takes `row` from above row `first` to row `last - 1`.
template <typename T, bool keep>
void extended(int64_t first, int64_t last, const Group<T>& group, Cell* row, Vec* probabilities) {
  const int64_t m = group.longest;
  for (int64_t i = first; i < last; ++i) {
    const T* cells = group.row(i);
    Cell left[kUnroll], corner[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      left[u] = {Vec{}, Int{} + kNever};
      corner[u] = row[u];
      row[u] = left[u];
    }
    for (int64_t j = 0; j < m; ++j) {
      for (int u = 0; u < kUnroll; ++u) {
        Vec s;
        const Cell k = local_kernel<T>(group.distances(cells, j, u), group.scale[u], s);
        const Cell up = row[(j + 1) * kUnroll + u];
        const Int exponent = larger(larger(left[u].exponent, up.exponent), corner[u].exponent);
        const Vec from_left = aligned(left[u], exponent), from_up = aligned(up, exponent);
        const Vec from_corner = aligned(corner[u], exponent);
        const Vec sum = (from_left + from_up) + from_corner;
        if constexpr (keep) {
          Vec* p = probabilities + (((i - first) * m + j) * kUnroll + u) * 3;
          p[0] = from_left / sum;
          p[1] = from_up / sum;
          p[2] = from_corner / sum;
        }
        const Cell value = product(sum, exponent, k);
        corner[u] = up;
        left[u] = value;
        row[(j + 1) * kUnroll + u] = value;
      }
    }
  }
}

template <typename T>
void log_kernels(Tile<T> tile, int64_t n, const Lane* lanes, int64_t count, void* workspace, double* result) {
  for (int64_t first = 0; first < count;) {
    const bool wide = lanes[first].extended;
    int64_t last = first + 1;
    while (last < count && last < first + kLanes && lanes[last].extended == wide) {
      ++last;
    }
    const Group<T> group(tile, lanes + first, last - first, workspace);
    Vec logs[kUnroll];
    if (wide) {
      Cell* row = static_cast<Cell*>(group.rest());
      begin(row, group.longest);
      extended<T, false>(0, n, group, row, nullptr);
      Cell ends[kUnroll];
      for (int l = 0; l < kLanes; ++l) {
        const Cell& cell = row[group.length[l] * kUnroll + l / kWidth];
        ends[l / kWidth].mantissa[l % kWidth] = cell.mantissa[l % kWidth];
        ends[l / kWidth].exponent[l % kWidth] = cell.exponent[l % kWidth];
      }
      for (int u = 0; u < kUnroll; ++u) {
        logs[u] = log_parts(ends[u].mantissa, ends[u].exponent);
      }
    } else {
      Vec* row = static_cast<Vec*>(group.rest());
      plain<T>(n, group, row);
      Vec ends[kUnroll];
      for (int l = 0; l < kLanes; ++l) {
        ends[l / kWidth][l % kWidth] = row[group.length[l] * kUnroll + l / kWidth][l % kWidth];
      }
      for (int u = 0; u < kUnroll; ++u) {
        logs[u] = log_parts(ends[u], Int{});
      }
    }
    for (int64_t l = 0; l < last - first; ++l) {
      result[first + l] = logs[l / kWidth][l % kWidth];
    }
    first = last;
  }
}

// Rows whose probabilities are kept at once on the way back. Longer sequences are run forward twice.
constexpr int64_t kKeptRows = 32;

GAK_INLINE int64_t row_cells(int64_t m) {
  return (m + 1) * kUnroll;
}

inline int64_t gradient_bytes(int64_t n, int64_t m) {
  const int64_t strips = (n + kKeptRows - 1) / kKeptRows, kept = n < kKeptRows ? n : kKeptRows;
  return (m + 1) * kLanes * sizeof(int32_t) + strips * row_cells(m) * sizeof(Cell) +
         (row_cells(m) + kept * m * kUnroll * 3) * sizeof(Vec);
}

// Walks the alignments back from the end: `expected` of a cell is the share of the kernel that passes through it.
template <typename T>
void gradients(
    Tile<T> tile, int64_t n, const Lane* lanes, int64_t count, const double* upstream, bool to_distances,
    void* workspace, T* gradient, int64_t gradient_stride) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t used = count - first < kLanes ? count - first : kLanes;
    const Group<T> group(tile, lanes + first, used, workspace);
    const int64_t m = group.longest, size = row_cells(m), strips = (n + kKeptRows - 1) / kKeptRows;
    Cell* above = static_cast<Cell*>(group.rest());  // (strips, size): what stands above each strip
    Vec* below = reinterpret_cast<Vec*>(above + strips * size);
    Vec* probabilities = below + size;
    begin(above, m);
    for (int64_t s = 1; s < strips; ++s) {
      for (int64_t c = 0; c < size; ++c) {
        above[s * size + c] = above[(s - 1) * size + c];
      }
      extended<T, false>((s - 1) * kKeptRows, s * kKeptRows, group, above + s * size, nullptr);
    }
    for (int64_t c = 0; c < size; ++c) {
      below[c] = Vec{};
    }
    for (int64_t s = strips - 1; s >= 0; --s) {
      const int64_t top = s * kKeptRows, bottom = n - top < kKeptRows ? n : top + kKeptRows;
      extended<T, true>(top, bottom, group, above + s * size, probabilities);
      for (int64_t i = bottom - 1; i >= top; --i) {
        for (int u = 0; u < kUnroll; ++u) {
          // `below[j]` is what row i + 1 sends to cell j; `diagonal` what it will send to the cell on its left.
          Vec from_right = Vec{}, diagonal = Vec{};
          for (int64_t j = m - 1; j >= 0; --j) {
            Vec expected = from_right + below[j * kUnroll + u];
            if (i == n - 1) {
              for (int w = 0; w < kWidth; ++w) {
                expected[w] += group.length[u * kWidth + w] == j + 1 ? 1.0 : 0.0;
              }
            }
            const Vec* p = probabilities + (((i - top) * m + j) * kUnroll + u) * 3;
            from_right = expected * p[0];
            below[j * kUnroll + u] = expected * p[1] + diagonal;
            diagonal = expected * p[2];
            Vec share = expected;
            if (to_distances) {
              Vec s;
              local_kernel<T>(group.distances(group.row(i), j, u), group.scale[u], s);
              share = share * group.scale[u] * (2.0 * 0.693147180559945309 / (2.0 - s));
            }
            for (int w = 0; w < kWidth; ++w) {
              const int l = u * kWidth + w;
              if (l < used && j < group.length[l]) {
                gradient[i * gradient_stride + group.column[l] + j] += T(share[w] * upstream[first + l]);
              }
            }
          }
        }
      }
    }
  }
}

GAK_INLINE double total(Vec v) {
  double sum = 0;
  for (int w = 0; w < kWidth; ++w) {
    sum += v[w];
  }
  return sum;
}

template <typename T>
GAK_INLINE Vec load(const T* from) {
  typename Narrow<T>::type values;
  __builtin_memcpy(&values, from, sizeof(values));
  return widened<T>(values);
}

// In the type of the input, a stretch at a time; what leaves its range is taken again with care by the caller.
template <typename T>
double sum_of_squares(const T* x, int64_t d) {
  typedef T Own __attribute__((vector_size(GAK_VECTOR_BYTES)));
  constexpr int width = GAK_VECTOR_BYTES / sizeof(T), stretch = 32 * width;
  double sum = 0;
  int64_t i = 0;
  while (i + 4 * width <= d) {
    const int64_t end = d - i < stretch ? i + (d - i) / (4 * width) * (4 * width) : i + stretch;
    Own part[4] = {};
    for (; i < end; i += 4 * width) {
      for (int u = 0; u < 4; ++u) {
        Own v;
        __builtin_memcpy(&v, x + i + u * width, sizeof(v));
        part[u] += v * v;
      }
    }
    const Own all = (part[0] + part[1]) + (part[2] + part[3]);
    for (int w = 0; w < width; ++w) {
      sum += all[w];
    }
  }
  for (; i < d; ++i) {
    sum += double(x[i]) * double(x[i]);
  }
  return sum;
}

template <typename T>
void scale(const T* x, int64_t d, double factor, T* result) {
  const T own = T(factor);
  for (int64_t i = 0; i < d; ++i) {
    result[i] = x[i] * own;
  }
}

template <typename T>
void widen_brain(const uint16_t* x, int64_t d, T* result) {
  for (int64_t i = 0; i < d; ++i) {
    result[i] = __builtin_bit_cast(float, uint32_t(x[i]) << 16);
  }
}

template <typename T>
void widen_half(const uint16_t* x, int64_t d, T* result) {
  for (int64_t i = 0; i < d; ++i) {
    const uint32_t sign = uint32_t(x[i] & 0x8000) << 16, rest = x[i] & 0x7fff;
    // The exponent moves from a bias of 15 to one of 127, and its largest, that of NaN and infinity, to the largest.
    const uint32_t normal = (rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23);
    const uint32_t denormal = __builtin_bit_cast(uint32_t, float(int32_t(rest)) * 0x1p-24f);
    result[i] = __builtin_bit_cast(float, sign | (rest < 0x400 ? denormal : normal));
  }
}

template <typename T>
double squared_distance(const T* a, const T* b, int64_t d) {
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= d; i += 4 * kWidth) {
    for (int u = 0; u < 4; ++u) {
      const Vec v = load(a + i + u * kWidth) - load(b + i + u * kWidth);
      sum[u] += v * v;
    }
  }
  double rest = 0;
  for (; i < d; ++i) {
    const double v = double(a[i]) - double(b[i]);
    rest += v * v;
  }
  return total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

template <typename T>
T distances(T* cosines, int64_t count) {
  typedef T Own __attribute__((vector_size(GAK_VECTOR_BYTES)));
  constexpr int width = GAK_VECTOR_BYTES / sizeof(T);
  T least = 4;
  Own smallest = Own{} + least;
  int64_t j = 0;
  for (; j + width <= count; j += width) {
    Own v;
    __builtin_memcpy(&v, cosines + j, sizeof(v));
    v = 2 - 2 * v;
    v = v > 0 ? v : Own{};
    smallest = v < smallest ? v : smallest;
    __builtin_memcpy(cosines + j, &v, sizeof(v));
  }
  for (int w = 0; w < width; ++w) {
    least = smallest[w] < least ? smallest[w] : least;
  }
  for (; j < count; ++j) {
    const T distance = 2 - 2 * cosines[j];
    cosines[j] = distance > 0 ? distance : T(0);
    least = cosines[j] < least ? cosines[j] : least;
  }
  return least;
}

template <typename T>
constexpr Loops<T> loops() {
  return {log_kernels<T>, gradients<T>, sum_of_squares<T>, scale<T>, widen_brain<T>, widen_half<T>, squared_distance<T>,
          distances<T>, kLanes, int64_t(sizeof(Cell)) * kUnroll + int64_t(sizeof(int32_t)) * kLanes, gradient_bytes};
}

}  // namespace

extern const Table table;
const Table table = {loops<float>(), loops<double>()};

}  // namespace GAK_ISA
}  // namespace gak
