#include "../torch-ext/torch_binding.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "dispatch.h"

#if defined(__GLIBC__)
// std::shared_ptr asks glibc 2.32 whether there are threads. Answering here keeps the library loadable with 2.28.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kSelf = 1, kCount = 2;
// A block is a run of samples whose slices are multiplied at once. Large enough for BLAS, small enough for the cache.
constexpr int64_t kBlock = 1024;
// Rows of a symmetric product that are multiplied at once: what they waste below the diagonal is half their square.
constexpr int64_t kStrip = 64;
// Below this squared distance, 2 - 2 cos loses too many digits in float32: the difference is taken instead.
constexpr double kClose = 0.1;
// Below, exponents of a kernel could leave the range that is set aside for them.
constexpr double kSmallestDelta = 1e-3;

template <typename T>
const gak::Loops<T>& loops() {
  static const gak::Table& table = []() -> const gak::Table& {
#if defined(__x86_64__)
    // For tests: a lower instruction set than the machine's.
    const char* limit = std::getenv("GAK_CPU_ISA");
    const std::string isa = limit ? limit : "";
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && isa != "avx2" && isa != "portable") {
      return gak::avx512::table;
    }
    if (avx2 && isa != "portable") {
      return gak::avx2::table;
    }
#endif
    return gak::portable::table;
  }();
  if constexpr (sizeof(T) == 8) {
    return table.twice;
  } else {
    return table.single;
  }
}

struct Free {
  void operator()(void* memory) const {
    std::free(memory);
  }
};

// Grows only; vectors want their alignment.
class Workspace {
 public:
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      size_ = (bytes + 63) / 64 * 64;
      memory_.reset(std::aligned_alloc(64, size_));
      STD_TORCH_CHECK(memory_, "The alignment kernel could not get ", size_, " bytes of memory.");
    }
    return memory_.get();
  }

 private:
  int64_t size_ = 0;
  std::unique_ptr<void, Free> memory_;
};

// `start` is the first row of the sample in the matrix that the recursion reads.
struct Prefix {
  int64_t start, length, sample, out;
};

struct Block {
  int64_t begin, end, first_slice, last_slice, texts;
};

// One set of prefixes, sorted by block and then by length, and the slices they use.
template <typename T>
struct Side {
  std::vector<Prefix> prefixes;
  std::vector<Block> blocks;
  std::vector<int64_t> start, need;  // per sample
  std::vector<int64_t> lengths;      // distinct, ascending
  std::vector<int64_t> length_index;
  std::vector<double> self;  // (prefixes, lengths of the other side)
  int64_t slices = 0;
  // Normalised halves, which the two sides share where they use the same slices; inside a block texts come first, `place`
  // says where a slice went.
  std::unique_ptr<T[]> memory;
  T *uni = nullptr, *cross = nullptr;
  std::vector<int32_t> place;

  Side(const Tensor& tensor, const int64_t* offsets, int64_t samples, bool compact, const char* name) {
    const int64_t* rows = static_cast<const int64_t*>(tensor.const_data_ptr());
    const int64_t count = tensor.size(0);
    STD_TORCH_CHECK(count > 0, "`", name, "` must have at least one row (sample, length).");
    need.assign(samples, 0);
    int64_t longest = 0;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t sample = rows[2 * p], length = rows[2 * p + 1];
      STD_TORCH_CHECK(
          sample >= 0 && sample < samples, "`", name, "[", p, "]` names sample ", sample, " of ", samples, ".");
      const int64_t available = offsets[sample + 1] - offsets[sample];
      STD_TORCH_CHECK(
          length >= 1 && length <= available, "`", name, "[", p, "]` has length ", length, ", but sample ", sample,
          " has ", available, " slices: lengths run from 1 to that.");
      need[sample] = std::max(need[sample], length);
      longest = std::max(longest, length);
      prefixes.push_back({0, length, sample, p});
    }
    start.assign(samples, 0);
    for (int64_t s = 0; s < samples; ++s) {
      start[s] = compact ? slices : offsets[s];
      slices += compact ? need[s] : offsets[s + 1] - offsets[s];
    }
    length_index.assign(longest + 1, 0);
    for (Prefix& prefix : prefixes) {
      prefix.start = start[prefix.sample];
      length_index[prefix.length] = 1;
    }
    for (int64_t l = 1; l <= longest; ++l) {
      if (length_index[l]) {
        length_index[l] = lengths.size();
        lengths.push_back(l);
      }
    }
    std::stable_sort(
        prefixes.begin(), prefixes.end(), [](const Prefix& a, const Prefix& b) { return a.sample < b.sample; });
    int64_t begin = 0;
    const auto last = [&](int64_t p) { return prefixes[p].start + need[prefixes[p].sample]; };
    for (int64_t end = 1; end <= count; ++end) {
      if (end == count || (last(end) - prefixes[begin].start > kBlock && prefixes[end].sample != prefixes[end - 1].sample)) {
        blocks.push_back({begin, end, prefixes[begin].start, last(end - 1), 0});
        begin = end;
      }
    }
    for (const Block& block : blocks) {
      std::stable_sort(
          prefixes.begin() + block.begin, prefixes.begin() + block.end,
          [](const Prefix& a, const Prefix& b) { return a.length < b.length; });
    }
  }
};

// log of the Delannoy numbers of all pairs of some lengths (ascending), by the plain sum with exponents of its own.
std::vector<double> log_counts(const std::vector<int64_t>& lengths) {
  const int64_t longest = lengths.back(), count = lengths.size();
  std::vector<double> mantissa(longest, 1.0), table(count * count, 0.0);
  std::vector<int64_t> exponent(longest, 0);
  for (int64_t i = 1, row = lengths[0] == 1; row < count; ++i) {
    double corner = 1.0, left = 1.0;
    int64_t corner_exponent = 0, left_exponent = 0;
    for (int64_t j = 1; j < longest; ++j) {
      const int64_t top = std::max(std::max(left_exponent, corner_exponent), exponent[j]);
      const auto part = [&](double value, int64_t own) { return top - own > 1000 ? 0.0 : __builtin_ldexp(value, int(own - top)); };
      double sum = part(left, left_exponent) + part(mantissa[j], exponent[j]) + part(corner, corner_exponent);
      int64_t sum_exponent = top;
      while (sum >= 2) {
        sum *= 0.5;
        ++sum_exponent;
      }
      corner = mantissa[j];
      corner_exponent = exponent[j];
      left = mantissa[j] = sum;
      left_exponent = exponent[j] = sum_exponent;
    }
    if (lengths[row] == i + 1) {
      for (int64_t column = 0; column < count; ++column) {
        const int64_t j = lengths[column] - 1;
        table[row * count + column] = gak::log_of(mantissa[j], exponent[j]);
      }
      ++row;
    }
  }
  return table;
}

// Whether every cell of the recursion stays a normal double without rescaling. A function of the pair alone.
bool needs_exponents(int64_t total, double scale) {
  return (total - 1) * (4.01 * scale + 0.6932) > 690 || 0.8815 * total > 690;
}

struct Bandwidth {
  double scale;
  bool extended;
  Bandwidth(int64_t total, double delta)
      : scale(1 / (delta * delta * total)), extended(needs_exponents(total, scale)) {}
};

// Spreads neighbours, which cost about the same, over the threads.
struct Shuffle {
  int64_t count, step;
  explicit Shuffle(int64_t count) : count(count), step(int64_t(count * 0.618) | 1) {
    while (std::__gcd(step, count) != 1) {
      step += 2;
    }
  }
  int64_t operator()(int64_t i) const {
    return i * step % count;
  }
};

template <typename T>
class Op {
 public:
  Op(const Tensor& prefixes, const std::optional<Tensor>& others, const int64_t* offsets, int64_t samples,
     bool compact, double delta, int64_t normalize)
      : rows(prefixes, offsets, samples, compact, "prefixes"), symmetric(!others), delta(delta), normalize(normalize) {
    if (others) {
      other_.emplace_back(*others, offsets, samples, compact, "other_prefixes");
    }
    columns = symmetric ? &rows : &other_[0];
    const int64_t longest = rows.lengths.back() + columns->lengths.back();
    for (int64_t total = 0; total <= longest; ++total) {
      bandwidths_.emplace_back(std::max<int64_t>(total, 1), delta);
    }
    if (normalize & kSelf) {
      rows.self.resize(rows.prefixes.size() * columns->lengths.size());
      if (!symmetric) {
        columns->self.resize(columns->prefixes.size() * rows.lengths.size());
      }
    }
    if (normalize & kCount) {
      std::vector<int64_t> lengths;
      std::set_union(
          rows.lengths.begin(), rows.lengths.end(), columns->lengths.begin(), columns->lengths.end(),
          std::back_inserter(lengths));
      counts_ = log_counts(lengths);
      counted_ = lengths.size();
      count_index_.resize(lengths.back() + 1);
      for (int64_t k = 0; k < counted_; ++k) {
        count_index_[lengths[k]] = k;
      }
    }
  }

  gak::Lane lane(int64_t column, int64_t length, int64_t total) const {
    return {column, length, bandwidths_[total].scale, bandwidths_[total].extended};
  }

  // Self-kernels of one prefix at the bandwidths of all its partners. Its sample begins at row and column `at`.
  void self_kernels(
      Side<T>& side, int64_t p, const Side<T>& partners, gak::Tile<T> tile, int64_t at, Workspace& workspace) {
    const Prefix& prefix = side.prefixes[p];
    const int64_t n = prefix.length, count = partners.lengths.size();
    std::vector<gak::Lane> lanes;
    for (int64_t length : partners.lengths) {
      // The pair's bandwidth, but n slices against n.
      const double scale = bandwidths_[n + length].scale;
      lanes.push_back({at, n, scale, needs_exponents(2 * n, scale)});
    }
    loops<T>().log_kernels(
        tile.from(at), n, lanes.data(), count, workspace.reserve((n + 1) * loops<T>().row_bytes), &side.self[p * count]);
  }

  // Everything of one pair of blocks. Of a block with itself, the tile holds the pairs of samples in their order only.
  void tile_kernels(const Block& a, const Block& b, gak::Tile<T> tile, T* result) {
    const bool diagonal = symmetric && a.begin == b.begin;
    const int64_t height = a.end - a.begin;
    const Shuffle shuffle(height);
    if (diagonal && (normalize & kSelf)) {
      torch::stable::parallel_for(0, height, 1, [&](int64_t begin, int64_t end) {
        Workspace workspace;
        for (int64_t w = begin; w < end; ++w) {
          const int64_t p = a.begin + shuffle(w);
          self_kernels(rows, p, rows, tile, rows.prefixes[p].start - a.first_slice, workspace);
        }
      });
    }
    const int64_t q_count = columns->prefixes.size();
    torch::stable::parallel_for(0, height, 1, [&](int64_t begin, int64_t end) {
      Workspace workspace;
      std::vector<int64_t> partners;
      std::vector<gak::Lane> lanes;
      std::vector<double> values;
      for (int64_t w = begin; w < end; ++w) {
        const int64_t p = a.begin + shuffle(w);
        const Prefix& row = rows.prefixes[p];
        if (diagonal && (normalize & kSelf)) {
          result[row.out * q_count + row.out] = 0;
        }
        partners.clear();
        lanes.clear();
        for (int64_t q = b.begin; q < b.end; ++q) {
          const Prefix& column = columns->prefixes[q];
          const bool same = column.sample == row.sample;
          if (diagonal && (same ? q < p || (q == p && (normalize & kSelf)) : column.sample < row.sample)) {
            continue;
          }
          partners.push_back(q);
          lanes.push_back(lane(column.start - b.first_slice, column.length, row.length + column.length));
        }
        if (lanes.empty()) {
          continue;
        }
        values.resize(lanes.size());
        loops<T>().log_kernels(
            tile.from(row.start - a.first_slice), row.length, lanes.data(), lanes.size(),
            workspace.reserve((lanes.back().length + 1) * loops<T>().row_bytes), values.data());
        for (size_t k = 0; k < partners.size(); ++k) {
          const Prefix& column = columns->prefixes[partners[k]];
          const T value = T(values[k] - divisor(p, partners[k]));
          result[row.out * q_count + column.out] = value;
          if (symmetric) {
            result[column.out * q_count + row.out] = value;
          }
        }
      }
    });
  }

  double divisor(int64_t p, int64_t q) const {
    const Prefix &row = rows.prefixes[p], &column = columns->prefixes[q];
    double value = 0;
    if (normalize & kSelf) {
      value += 0.5 * (rows.self[p * columns->lengths.size() + columns->length_index[column.length]] +
                      columns->self[q * rows.lengths.size() + rows.length_index[row.length]]);
    }
    if (normalize & kCount) {
      value += count(row.length, column.length);
      if (normalize & kSelf) {
        value -= 0.5 * (count(row.length, row.length) + count(column.length, column.length));
      }
    }
    return value;
  }

  double count(int64_t n, int64_t m) const {
    return counts_[count_index_[n] * counted_ + count_index_[m]];
  }

  Side<T> rows;
  Side<T>* columns;
  bool symmetric;
  double delta;
  int64_t normalize;

 private:
  std::vector<Side<T>> other_;
  std::vector<double> counts_;
  int64_t counted_ = 0;
  std::vector<int64_t> count_index_;
  std::vector<Bandwidth> bandwidths_;
};

template <typename T>
constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

template <typename T>
Tensor view(T* data, int64_t height, int64_t width, int64_t stride, int64_t step) {
  const int64_t sizes[] = {height, width}, strides[] = {stride, step};
  return torch::stable::from_blob(
      data, {sizes, 2}, {strides, 2}, torch::stable::Device(torch::headeronly::DeviceType::CPU), kType<T>);
}

// c = a @ b^T with the BLAS of torch.
template <typename T>
void product(T* a, T* b, T* c, int64_t n, int64_t m, int64_t d, int64_t stride) {
  if (n == 0 || m == 0) {
    return;
  }
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(view(a, n, d, d, 1)), torch::stable::detail::from(view(b, d, m, 1, d)),
      torch::stable::detail::from(view(c, n, m, stride, 1))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename T>
struct Slices {
  const void* embeddings;
  ScalarType type;
  const int64_t* modality;
  const int64_t* offsets;
  int64_t count, samples, d, uni, cross;

  void arrange(Side<T>& side) const {
    side.place.resize(side.slices);
    int64_t sample = 0;
    for (Block& block : side.blocks) {
      int64_t front = block.first_slice;
      for (int pass = 0; pass < 2; ++pass) {
        int64_t s = sample;
        for (; s < samples && (side.need[s] == 0 || side.start[s] < block.last_slice); ++s) {
          for (int64_t i = 0; i < side.need[s]; ++i) {
            const bool text = !modality || modality[offsets[s] + i] == 0;
            if (text == (pass == 0)) {
              side.place[side.start[s] + i] = int32_t(front++ - block.first_slice);
            }
          }
        }
        if (pass == 0) {
          block.texts = front - block.first_slice;
        } else {
          sample = s;
        }
      }
    }
  }

  // A slice in T. Narrow dtypes are widened one slice at a time, because all at once would take twice the memory.
  const T* slice(int64_t i, std::vector<T>& widened) const {
    const auto widen = [&](const auto* x) {
      std::copy(x + i * d, x + (i + 1) * d, widened.begin());
      return widened.data();
    };
    if (type == ScalarType::BFloat16) {
      return widen(static_cast<const torch::headeronly::BFloat16*>(embeddings));
    }
    if (type == ScalarType::Half) {
      return widen(static_cast<const torch::headeronly::Half*>(embeddings));
    }
    return static_cast<const T*>(embeddings) + i * d;
  }

  // 0 good, 1 NaN or infinity, 2, 3, 4 zeros in all, in the first, in the second half.
  int half(const T* x, int64_t width, T* to, T* to_other, int complaint) const {
    const double squares = loops<T>().sum_of_squares(x, width);
    const double smallest = sizeof(T) == 8 ? 1e-290 : 1e-25, largest_squares = sizeof(T) == 8 ? 1e300 : 1e35;
    if (!(squares < largest_squares && squares > smallest)) {
      double largest = 0;
      for (int64_t i = 0; i < width; ++i) {
        const double size = x[i] < 0 ? -double(x[i]) : double(x[i]);
        if (!(size <= 1.7976931348623157e308)) {
          return 1;
        }
        largest = std::max(largest, size);
      }
      if (largest == 0) {
        return complaint;
      }
      // Two steps, because the factor of a denormal number would itself be infinite.
      const double lift = largest < 1e-300 ? 1e300 : 1, factor = 1 / (largest * lift);
      std::vector<T> lifted(width);
      for (int64_t i = 0; i < width; ++i) {
        lifted[i] = T(x[i] * lift * factor);
      }
      return half(lifted.data(), width, to, to_other, complaint);
    }
    const double factor = 1 / __builtin_sqrt(squares);
    for (T* target : {to, to_other}) {
      if (target) {
        loops<T>().scale(x, width, factor, target);
      }
    }
    return 0;
  }

  void normalize(Op<T>& op) const {
    std::atomic<int64_t> bad{INT64_MAX};
    std::vector<int64_t> sample_of(count);
    for (int64_t s = 0; s < samples; ++s) {
      std::fill(sample_of.begin() + offsets[s], sample_of.begin() + offsets[s + 1], s);
    }
    std::vector<Side<T>*> sides{&op.rows};
    if (!op.symmetric && op.columns->need != op.rows.need) {
      sides.push_back(op.columns);
    }
    for (Side<T>* side : sides) {
      side->memory.reset(new T[side->slices * d]);
      side->uni = side->memory.get();
      side->cross = side->uni + side->slices * uni;
    }
    arrange(op.rows);
    if (!op.symmetric) {
      arrange(*op.columns);
      if (sides.size() == 1) {
        op.columns->uni = op.rows.uni;
        op.columns->cross = op.rows.cross;
      }
    }
    std::vector<int64_t> block_start[2];
    for (size_t k = 0; k < sides.size(); ++k) {
      block_start[k].resize(sides[k]->slices);
      for (const Block& block : sides[k]->blocks) {
        std::fill(block_start[k].begin() + block.first_slice, block_start[k].begin() + block.last_slice, block.first_slice);
      }
    }
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      std::vector<T> widened(type == kType<T> ? 0 : d);
      for (int64_t i = begin; i < end; ++i) {
        const T* x = slice(i, widened);
        const int64_t sample = sample_of[i], within = i - offsets[sample];
        T *to[2] = {}, *to_cross[2] = {};
        for (size_t k = 0; k < sides.size(); ++k) {
          if (within < sides[k]->need[sample]) {
            const int64_t at = sides[k]->start[sample] + within, row = block_start[k][at] + sides[k]->place[at];
            to[k] = sides[k]->uni + row * uni;
            to_cross[k] = sides[k]->cross + row * cross;
          }
        }
        int problem = half(x, uni, to[0], to[1], cross ? 3 : 2);
        if (!problem && cross) {
          problem = half(x + uni, cross, to_cross[0], to_cross[1], 4);
        }
        if (problem) {
          const int64_t code = i * 8 + problem;
          int64_t known = bad.load();
          while (code < known && !bad.compare_exchange_weak(known, code)) {
          }
        }
      }
    });
    const int64_t code = bad.load();
    if (code != INT64_MAX) {
      const int64_t row = code / 8, sample = sample_of[row];
      const std::string edge = std::to_string(uni);
      const std::string what[] = {
          "", "holds NaN or infinity", "is all zeros and has no direction",
          "is all zeros in its first " + edge + " dimensions", "is all zeros after its first " + edge + " dimensions"};
      STD_TORCH_CHECK(
          false, "Slice ", row - offsets[sample], " of sequence ", sample, " (row ", row,
          " of the packed embeddings) ", what[code % 8], ".");
    }
  }

  // Squared distances of two blocks, texts before images. Of a block with itself, what pairs of samples in their order
  // need, and each sample with itself in both directions.
  void distances(const Op<T>& op, const Block& a, const Block& b, T* tile) const {
    const int64_t height = a.last_slice - a.first_slice, width = b.last_slice - b.first_slice;
    const bool diagonal = op.symmetric && a.begin == b.begin;
    T *left = op.rows.uni + a.first_slice * uni, *right = op.columns->uni + b.first_slice * uni;
    T* left_cross = op.rows.cross + a.first_slice * cross;
    T* right_cross = op.columns->cross + b.first_slice * cross;
    const int64_t texts = a.texts, column_texts = b.texts;
    const auto same = [&](int64_t from, int64_t to, int64_t column_from, int64_t column_to) {
      const int64_t strip = diagonal ? kStrip : to - from;
      for (int64_t i = from; i < to; i += strip) {
        const int64_t j = diagonal ? i : column_from;
        product(
            left + i * uni, right + j * uni, tile + i * width + j, std::min(strip, to - i), column_to - j, uni, width);
      }
    };
    same(0, texts, 0, column_texts);
    same(texts, height, column_texts, width);
    product(left_cross, right_cross + column_texts * cross, tile + column_texts, texts, width - column_texts, cross, width);
    if (!diagonal) {
      product(left_cross + texts * cross, right_cross, tile + texts * width, height - texts, column_texts, cross, width);
    }
    torch::stable::parallel_for(0, height, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = tile + r * width;
        const int64_t first = diagonal ? r : 0;
        if (loops<T>().distances(row + first, width - first) >= kClose) {
          continue;
        }
        for (int64_t c = first; c < width; ++c) {
          if (row[c] < kClose) {
            if (diagonal && r == c) {
              row[c] = 0;
            } else {
              row[c] = (r < texts) == (c < column_texts)
                           ? loops<T>().squared_distance(left + r * uni, right + c * uni, uni)
                           : loops<T>().squared_distance(left_cross + r * cross, right_cross + c * cross, cross);
            }
          }
        }
      }
    });
    if (diagonal) {
      mirror(op.rows, a, tile, height);
    }
  }

  // Images with texts from texts with images, and the lower triangle of every sample.
  void mirror(const Side<T>& side, const Block& block, T* tile, int64_t size) const {
    constexpr int64_t step = 16;
    const int64_t texts = block.texts, bands = (size - texts + step - 1) / step;
    torch::stable::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = texts + step * begin; r < std::min(texts + step * end, size); r += step) {
        for (int64_t c = 0; c < texts; c += step) {
          for (int64_t i = r; i < std::min(r + step, size); ++i) {
            for (int64_t j = c; j < std::min(c + step, texts); ++j) {
              tile[i * size + j] = tile[j * size + i];
            }
          }
        }
      }
    });
    for (int64_t s = 0; s < samples; ++s) {
      if (side.need[s] == 0 || side.start[s] < block.first_slice || side.start[s] >= block.last_slice) {
        continue;
      }
      const int32_t* place = side.place.data() + side.start[s];
      for (int64_t i = 0; i < side.need[s]; ++i) {
        for (int64_t j = 0; j < i; ++j) {
          const int64_t r = place[i], c = place[j];
          if ((r < texts) == (c < texts)) {
            tile[r * size + c] = tile[c * size + r];
          }
        }
      }
    }
  }

  // Without symmetry no tile holds a sample against itself.
  void self_kernels(Op<T>& op, Side<T>& side, const Side<T>& partners) const {
    std::vector<std::vector<int64_t>> prefixes(samples);
    for (size_t p = 0; p < side.prefixes.size(); ++p) {
      prefixes[side.prefixes[p].sample].push_back(p);
    }
    const Shuffle shuffle(samples);
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      Workspace workspace;
      std::vector<T> own;
      for (int64_t w = begin; w < end; ++w) {
        const int64_t sample = shuffle(w), n = side.need[sample], start = side.start[sample];
        const Block* block = &side.blocks[0];
        while (n && block->last_slice <= start) {
          ++block;
        }
        own.assign(n * n, T(0));
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < i; ++j) {
            const int64_t r = side.place[start + i], c = side.place[start + j];
            const int64_t x = block->first_slice + r, y = block->first_slice + c;
            own[i * n + j] = own[j * n + i] =
                (r < block->texts) == (c < block->texts)
                    ? loops<T>().squared_distance(side.uni + x * uni, side.uni + y * uni, uni)
                    : loops<T>().squared_distance(side.cross + x * cross, side.cross + y * cross, cross);
          }
        }
        for (int64_t p : prefixes[sample]) {
          op.self_kernels(side, p, partners, {own.data(), n}, 0, workspace);
        }
      }
    });
  }
};

void check_cpu(const Tensor& tensor, ScalarType type, int64_t dim, const char* name, const char* what) {
  STD_TORCH_CHECK(tensor.is_cpu(), "`", name, "` must be on the CPU like the embeddings.");
  STD_TORCH_CHECK(
      tensor.scalar_type() == type && tensor.dim() == dim && tensor.is_contiguous(), "`", name, "` must be a contiguous ",
      what, " tensor of ", dim, " dimension(s).");
}

int64_t check_offsets(const Tensor& offsets, int64_t total) {
  check_cpu(offsets, ScalarType::Long, 1, "offsets", "int64");
  const int64_t* values = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t samples = offsets.size(0) - 1;
  STD_TORCH_CHECK(
      samples >= 1 && values[0] == 0 && values[samples] == total, "`offsets` must run from 0 to ", total,
      ", the number of slices.");
  for (int64_t s = 0; s < samples; ++s) {
    STD_TORCH_CHECK(
        values[s] < values[s + 1], "`offsets` must increase, but sequence ", s, " is empty: every sample needs a slice.");
  }
  return samples;
}

void check_prefixes(const Tensor& prefixes, const std::optional<Tensor>& others) {
  check_cpu(prefixes, ScalarType::Long, 2, "prefixes", "int64");
  STD_TORCH_CHECK(prefixes.size(1) == 2, "`prefixes` must have rows (sample, length).");
  if (others) {
    check_cpu(*others, ScalarType::Long, 2, "other_prefixes", "int64");
    STD_TORCH_CHECK(others->size(1) == 2, "`other_prefixes` must have rows (sample, length).");
  }
}

void check_delta(double delta) {
  STD_TORCH_CHECK(
      delta >= kSmallestDelta && delta < 1.7976931348623157e308, "`delta` must be finite and at least ", kSmallestDelta,
      ", got ", delta, ".");
}

template <typename T>
void log_alignment(
    const Tensor& embeddings, const Tensor& offsets, int64_t samples, const Tensor& prefixes,
    const std::optional<Tensor>& others, const std::optional<Tensor>& modality, int64_t split, double delta,
    int64_t normalize, Tensor& result) {
  const int64_t* starts = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t d = embeddings.size(1), uni = modality ? split : d;
  Op<T> op(prefixes, others, starts, samples, true, delta, normalize);
  const Slices<T> slices{
      embeddings.const_data_ptr(),
      embeddings.scalar_type(),
      modality ? static_cast<const int64_t*>(modality->const_data_ptr()) : nullptr,
      starts,
      embeddings.size(0),
      samples,
      d,
      uni,
      d - uni};
  slices.normalize(op);
  if (!op.symmetric && (normalize & kSelf)) {
    slices.self_kernels(op, op.rows, *op.columns);
    slices.self_kernels(op, *op.columns, op.rows);
  }
  int64_t height = 0, width = 0;
  for (const Block& block : op.rows.blocks) {
    height = std::max(height, block.last_slice - block.first_slice);
  }
  for (const Block& block : op.columns->blocks) {
    width = std::max(width, block.last_slice - block.first_slice);
  }
  std::unique_ptr<T[]> tile(new T[height * width]);
  T* out = static_cast<T*>(result.mutable_data_ptr());
  // Blocks against themselves first: they hold the self-kernels that all others are divided by.
  const size_t n = op.rows.blocks.size(), m = op.columns->blocks.size();
  const auto run = [&](const Block& a, const Block& b) {
    slices.distances(op, a, b, tile.get());
    op.tile_kernels(
        a, b,
        {tile.get(), b.last_slice - b.first_slice, op.rows.place.data() + a.first_slice,
         op.columns->place.data() + b.first_slice},
        out);
  };
  for (size_t i = 0; op.symmetric && i < n; ++i) {
    run(op.rows.blocks[i], op.rows.blocks[i]);
  }
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = op.symmetric ? i + 1 : 0; j < m; ++j) {
      run(op.rows.blocks[i], op.columns->blocks[j]);
    }
  }
}

template <typename T>
void log_recursion(
    const Tensor& distances, const Tensor& offsets, int64_t samples, const Tensor& prefixes,
    const std::optional<Tensor>& others, double delta, int64_t normalize, Tensor& result) {
  Op<T> op(prefixes, others, static_cast<const int64_t*>(offsets.const_data_ptr()), samples, false, delta, normalize);
  const T* matrix = static_cast<const T*>(distances.const_data_ptr());
  const int64_t stride = distances.size(0);
  T* out = static_cast<T*>(result.mutable_data_ptr());
  const auto own = [&](Side<T>& side, const Side<T>& partners) {
    const Shuffle shuffle(side.prefixes.size());
    torch::stable::parallel_for(0, side.prefixes.size(), 1, [&](int64_t begin, int64_t end) {
      Workspace workspace;
      for (int64_t w = begin; w < end; ++w) {
        const int64_t p = shuffle(w);
        op.self_kernels(side, p, partners, {matrix, stride}, side.prefixes[p].start, workspace);
      }
    });
  };
  if (!op.symmetric && (normalize & kSelf)) {
    own(op.rows, *op.columns);
    own(*op.columns, op.rows);
  }
  const auto run = [&](const Block& a, const Block& b) {
    op.tile_kernels(a, b, {matrix + a.first_slice * stride + b.first_slice, stride}, out);
  };
  const size_t n = op.rows.blocks.size(), m = op.columns->blocks.size();
  for (size_t i = 0; op.symmetric && i < n; ++i) {
    run(op.rows.blocks[i], op.rows.blocks[i]);
  }
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = op.symmetric ? i + 1 : 0; j < m; ++j) {
      run(op.rows.blocks[i], op.columns->blocks[j]);
    }
  }
}

template <typename T>
void log_recursion_backward(
    const Tensor& upstream, const Tensor& distances, const Tensor& offsets, int64_t samples, const Tensor& prefixes,
    const std::optional<Tensor>& others, double delta, int64_t normalize, Tensor& result) {
  Op<T> op(
      prefixes, others, static_cast<const int64_t*>(offsets.const_data_ptr()), samples, false, delta, normalize & kSelf);
  const T* matrix = static_cast<const T*>(distances.const_data_ptr());
  const T* g = static_cast<const T*>(upstream.const_data_ptr());
  T* out = static_cast<T*>(result.mutable_data_ptr());
  const int64_t stride = distances.size(0);
  const bool by_self = normalize & kSelf;
  const int64_t q_count = op.columns->prefixes.size();
  // A thread owns the rows of a sample, so that the sums are the same on every run.
  std::vector<std::vector<int64_t>> row_of(samples), column_of(samples);
  for (size_t p = 0; p < op.rows.prefixes.size(); ++p) {
    row_of[op.rows.prefixes[p].sample].push_back(p);
  }
  if (!op.symmetric) {
    for (int64_t q = 0; q < q_count; ++q) {
      column_of[op.columns->prefixes[q].sample].push_back(q);
    }
  }
  const Shuffle shuffle(samples);
  torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
    Workspace workspace;
    std::vector<gak::Lane> lanes;
    std::vector<double> weight;
    const auto run = [&](const Prefix& prefix) {
      int64_t longest = 0;
      for (const gak::Lane& lane : lanes) {
        longest = std::max(longest, lane.length);
      }
      const int64_t n = prefix.length;
      loops<T>().gradients(
          {matrix + prefix.start * stride, stride}, n, lanes.data(), lanes.size(), weight.data(), true,
          workspace.reserve(loops<T>().gradient_bytes(n, longest)), out + prefix.start * stride, stride);
    };
    const auto run_self = [&](const Prefix& prefix, const Side<T>& partners, std::vector<double>& sums) {
      lanes.clear();
      weight.clear();
      for (size_t l = 0; l < partners.lengths.size(); ++l) {
        if (sums[l] != 0) {
          lanes.push_back(op.lane(prefix.start, prefix.length, prefix.length + partners.lengths[l]));
          weight.push_back(-0.5 * sums[l]);
        }
      }
      if (!lanes.empty()) {
        run(prefix);
      }
    };
    for (int64_t w = begin; w < end; ++w) {
      const int64_t sample = shuffle(w);
      for (int64_t p : row_of[sample]) {
        const Prefix& row = op.rows.prefixes[p];
        std::vector<double> sums(op.columns->lengths.size(), 0.0);
        lanes.clear();
        weight.clear();
        for (int64_t q = 0; q < q_count; ++q) {
          const Prefix& column = op.columns->prefixes[q];
          double value = g[row.out * q_count + column.out];
          if (op.symmetric) {
            if (q == p && by_self) {
              continue;
            }
            if (q != p) {
              value += g[column.out * q_count + row.out];
            }
          }
          sums[op.columns->length_index[column.length]] += value;
          if (value != 0 && (!op.symmetric || q >= p)) {
            lanes.push_back(op.lane(column.start, column.length, row.length + column.length));
            weight.push_back(value);
          }
        }
        if (!lanes.empty()) {
          run(row);
        }
        if (by_self) {
          run_self(row, *op.columns, sums);
        }
      }
      for (int64_t q : column_of[sample]) {
        if (!by_self) {
          break;
        }
        const Prefix& column = op.columns->prefixes[q];
        std::vector<double> sums(op.rows.lengths.size(), 0.0);
        for (const Prefix& row : op.rows.prefixes) {
          sums[op.rows.length_index[row.length]] += g[row.out * q_count + column.out];
        }
        run_self(column, op.rows, sums);
      }
    }
  });
}

template <typename T>
void visits(const Tensor& distances, double delta, Tensor& result) {
  const int64_t n = distances.size(0), m = distances.size(1);
  const Bandwidth bandwidth(n + m, delta);
  const gak::Lane pair{0, m, bandwidth.scale, bandwidth.extended};
  const double one = 1;
  Workspace workspace;
  loops<T>().gradients(
      {static_cast<const T*>(distances.const_data_ptr()), m}, n, &pair, 1, &one, false,
      workspace.reserve(loops<T>().gradient_bytes(n, m)),
      static_cast<T*>(result.mutable_data_ptr()), m);
}

void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "`", name, "` must be on the CPU.");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), "`", name, "` must be contiguous with 2 dimensions.");
}

bool is_double(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double, "`", name,
      "` must be float32 or float64.");
  return tensor.scalar_type() == ScalarType::Double;
}

}  // namespace

Tensor gak_log_alignment(
    const Tensor& embeddings, const Tensor& offsets, const Tensor& prefixes, const std::optional<Tensor>& others,
    const std::optional<Tensor>& modality, int64_t split, double delta, int64_t normalize) {
  check_matrix(embeddings, "embeddings");
  const ScalarType type = embeddings.scalar_type();
  const bool twice = type == ScalarType::Double;
  STD_TORCH_CHECK(
      twice || type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "`embeddings` must be bfloat16, float16, float32 or float64.");
  const int64_t samples = check_offsets(offsets, embeddings.size(0));
  check_prefixes(prefixes, others);
  check_delta(delta);
  if (modality) {
    check_cpu(*modality, ScalarType::Long, 1, "modality", "int64");
    STD_TORCH_CHECK(
        modality->size(0) == embeddings.size(0), "`modality` has ", modality->size(0), " entries for ",
        embeddings.size(0), " slices.");
    STD_TORCH_CHECK(
        split > 0 && split < embeddings.size(1), "`split` must lie between 1 and ", embeddings.size(1) - 1,
        ", because embeddings have ", embeddings.size(1), " dimensions; got ", split, ".");
    const int64_t* codes = static_cast<const int64_t*>(modality->const_data_ptr());
    for (int64_t i = 0; i < modality->size(0); ++i) {
      STD_TORCH_CHECK(codes[i] == 0 || codes[i] == 1, "`modality` may hold 0 (text) and 1 (image) only.");
    }
  }
  const int64_t sizes[] = {prefixes.size(0), others ? others->size(0) : prefixes.size(0)};
  Tensor result = torch::stable::new_empty(embeddings, {sizes, 2}, twice ? ScalarType::Double : ScalarType::Float);
  (twice ? log_alignment<double> : log_alignment<float>)(
      embeddings, offsets, samples, prefixes, others, modality, split, delta, normalize, result);
  return result;
}

Tensor gak_log_recursion(
    const Tensor& distances, const Tensor& offsets, const Tensor& prefixes, const std::optional<Tensor>& others,
    double delta, int64_t normalize) {
  const bool twice = is_double(distances, "distances");
  STD_TORCH_CHECK(distances.size(0) == distances.size(1), "`distances` must be square.");
  const int64_t samples = check_offsets(offsets, distances.size(0));
  check_prefixes(prefixes, others);
  check_delta(delta);
  const int64_t sizes[] = {prefixes.size(0), others ? others->size(0) : prefixes.size(0)};
  Tensor result = torch::stable::new_empty(distances, {sizes, 2});
  (twice ? log_recursion<double> : log_recursion<float>)(
      distances, offsets, samples, prefixes, others, delta, normalize, result);
  return result;
}

Tensor gak_log_recursion_backward(
    const Tensor& gradient, const Tensor& distances, const Tensor& offsets, const Tensor& prefixes,
    const std::optional<Tensor>& others, double delta, int64_t normalize) {
  const bool twice = is_double(distances, "distances");
  STD_TORCH_CHECK(is_double(gradient, "gradient") == twice, "`gradient` must have the dtype of `distances`.");
  STD_TORCH_CHECK(distances.size(0) == distances.size(1), "`distances` must be square.");
  const int64_t samples = check_offsets(offsets, distances.size(0));
  check_prefixes(prefixes, others);
  check_delta(delta);
  STD_TORCH_CHECK(
      gradient.size(0) == prefixes.size(0) && gradient.size(1) == (others ? *others : prefixes).size(0),
      "`gradient` must have a row for every prefix and a column for every other one.");
  Tensor result = torch::stable::new_zeros(distances, distances.sizes());
  (twice ? log_recursion_backward<double> : log_recursion_backward<float>)(
      gradient, distances, offsets, samples, prefixes, others, delta, normalize, result);
  return result;
}

Tensor gak_expected_alignment(const Tensor& distances, double delta) {
  const bool twice = is_double(distances, "distances");
  check_delta(delta);
  STD_TORCH_CHECK(distances.numel() > 0, "Both sequences need at least one slice.");
  Tensor result = torch::stable::new_zeros(distances, distances.sizes());
  (twice ? visits<double> : visits<float>)(distances, delta, result);
  return result;
}
