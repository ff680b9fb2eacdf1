#include "../torch-ext/torch_binding.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
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
// A thread multiplies pieces of so many rows; what they waste below a diagonal is half their square. They have as many
// columns, or more, which is a little faster, where that leaves many to each thread.
constexpr int64_t kStrip = 64, kWide = 256, kManyPieces = 16;
// Dimensions that are multiplied at once: fewest, and fewest for the sake of more threads.
constexpr int64_t kNarrow = 16, kDeep = 256;
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

// Grows only, and loses what it held. Vectors want their alignment. (aligned_alloc would do, but asks for more than it
// takes, so that it never finds room where one like it was freed.)
class Workspace {
 public:
  void* reserve(int64_t bytes) {
    constexpr int64_t alignment = 64;
    if (bytes > size_) {
      memory_.reset();
      memory_.reset(new char[bytes + alignment]);
      size_ = bytes;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (alignment - address % alignment) % alignment;
  }

 private:
  int64_t size_ = 0;
  std::unique_ptr<char[]> memory_;
};

// `start` is the first row of the sample in the matrix that the recursion reads.
struct Prefix {
  int64_t start, length, sample, out;
};

struct Block {
  int64_t begin, end, first_slice, last_slice, texts;
};

// A number for each of a run of prefixes (or lengths) and each of a run of lengths of the other side: self-kernels at the
// bandwidth of the two, or numbers of alignments.
struct Table {
  int64_t first = 0, first_length = 0, width = 0;
  std::unique_ptr<double[]> values;

  void reset(int64_t begin, int64_t end, int64_t begin_length, int64_t end_length) {
    first = begin;
    first_length = begin_length;
    width = end_length - begin_length;
    values.reset();
    values.reset(new double[(end - begin) * width]);
  }
  double* of(int64_t prefix) {
    return values.get() + (prefix - first) * width;
  }
  double at(int64_t prefix, int64_t length) const {
    return values[(prefix - first) * width + length - first_length];
  }
};

// One set of prefixes, sorted by block and then by length, and the slices they use.
template <typename T>
struct Side {
  std::vector<Prefix> prefixes;
  std::vector<Block> blocks;
  std::vector<int64_t> start, need;  // per sample
  std::vector<int64_t> lengths;      // distinct, ascending
  std::vector<int64_t> length_index;
  int64_t slices = 0;
  // Inside a block texts come first: `place` says where a slice went, `source` which embedding came there.
  std::vector<int32_t> place;
  std::vector<int64_t> source;

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
  }

  // Blocks of about so many slices; a sample is never cut.
  void cut(int64_t size) {
    const int64_t count = prefixes.size();
    std::stable_sort(
        prefixes.begin(), prefixes.end(), [](const Prefix& a, const Prefix& b) { return a.sample < b.sample; });
    int64_t begin = 0;
    const auto last = [&](int64_t p) { return prefixes[p].start + need[prefixes[p].sample]; };
    for (int64_t end = 1; end <= count; ++end) {
      if (end == count || (last(end) - prefixes[begin].start > size && prefixes[end].sample != prefixes[end - 1].sample)) {
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

  // The prefixes of a block whose lengths lie in a run of the distinct ones.
  Block within(Block block, int64_t first_length, int64_t last_length) const {
    const auto at = [&](int64_t index) {
      return std::partition_point(
                 prefixes.begin() + block.begin, prefixes.begin() + block.end,
                 [&](const Prefix& prefix) { return length_index[prefix.length] < index; }) -
             prefixes.begin();
    };
    const int64_t begin = at(first_length), end = at(last_length);
    block.begin = begin;
    block.end = end;
    return block;
  }
};

// Delannoy numbers, row after row, by the plain sum with exponents of its own: `row(n, log)` is told n and may ask for
// log(m) of all m up to `columns`.
template <typename Row>
void delannoy(int64_t rows, int64_t columns, const Row& row) {
  std::vector<double> mantissa(columns, 1.0);
  std::vector<int64_t> exponent(columns, 0);
  const auto log = [&](int64_t m) { return gak::log_of(mantissa[m - 1], exponent[m - 1]); };
  for (int64_t i = 0; i < rows; ++i) {
    double corner = 1.0, left = 1.0;
    int64_t corner_exponent = 0, left_exponent = 0;
    for (int64_t j = 1; i > 0 && j < columns; ++j) {
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
    row(i + 1, log);
  }
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

// Calls `work(thread, next)` on so many threads at most. `next(i)` gives a thread the next number below `count`: what they
// do takes different times.
template <typename Work>
void in_turn(int64_t threads, int64_t count, const Work& work) {
  std::atomic<int64_t> number{0};
  const auto next = [&](int64_t& i) { return (i = number++) < count; };
  torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t thread, int64_t) { work(thread, next); });
}

// Part of a tile that one thread computes, of the columns from `panel` to `right`.
struct Piece {
  int half;
  int64_t top, bottom, panel, left, right;
  bool close;

  // Where a row begins, which is on the diagonal where that passes through.
  int64_t first(int64_t row, bool diagonal) const {
    return diagonal ? std::max(row, left) : left;
  }
};

// The normalised slices that a thread multiplies. They are its own copies: what is written by one core and read by another
// has a long way to go where the two do not share a cache.
template <typename T>
struct Multiplied {
  T *left, *right;
  std::array<int64_t, 4> held[2] = {};

  // Whether it has them already. If not, it will.
  bool holds(int side, int64_t half, int64_t from, int64_t begin, int64_t end) {
    const std::array<int64_t, 4> wanted{half, from, begin, end};
    return std::exchange(held[side], wanted) == wanted;
  }
};

template <typename T>
struct Multiplier {
  int64_t rows, columns, threads, step;
  int64_t room;  // of each thread

  // For tiles of `height` by `width` slices at most, halves of `dim` dimensions at most, and so many bytes; but for a
  // number for each slice of a sample at least.
  Multiplier(int64_t height, int64_t width, int64_t dim, int64_t bytes, int64_t longest) {
    const int64_t available = torch::stable::get_num_threads(), numbers = bytes / sizeof(T);
    const bool wide =
        height * width >= kManyPieces * available * kStrip * kWide && numbers >= available * (kStrip + kWide) * dim;
    rows = std::min(kStrip, height);
    columns = std::min(wide ? kWide : kStrip, width);
    const int64_t slices = rows + columns;
    threads = std::min(available, std::max<int64_t>(1, numbers / (slices * std::min(dim, kDeep))));
    step = std::min(dim, std::max(kNarrow, numbers / (slices * threads)));
    room = std::max(slices * step, longest);
    memory_.reset(new T[threads * room]);
  }

  template <typename Work>
  void run(int64_t count, const Work& work) {
    in_turn(threads, count, [&](int64_t thread, const auto& next) {
      T* left = memory_.get() + thread * room;
      Multiplied<T> mine{left, left + rows * step};
      for (int64_t i; next(i);) {
        work(i, mine);
      }
    });
  }

 private:
  std::unique_ptr<T[]> memory_;
};

template <typename T>
class Op {
 public:
  // `spare` is the memory, in bytes, that self-kernels and counts may take, and again the workspaces of threads.
  Op(const Tensor& prefixes, const std::optional<Tensor>& others, const int64_t* offsets, int64_t samples,
     bool compact, double delta, int64_t normalize, int64_t spare)
      : rows(prefixes, offsets, samples, compact, "prefixes"),
        symmetric(!others),
        delta(delta),
        normalize(normalize),
        spare_(spare) {
    if (others) {
      other_.emplace_back(*others, offsets, samples, compact, "other_prefixes");
    }
    columns = symmetric ? &rows : &other_[0];
    const int64_t longest = rows.lengths.back() + columns->lengths.back();
    for (int64_t total = 0; total <= longest; ++total) {
      bandwidths_.emplace_back(std::max<int64_t>(total, 1), delta);
    }
    const int64_t n = rows.lengths.size(), m = columns->lengths.size();
    int64_t numbers = normalize & kCount ? n * m : 0;
    if (normalize & kSelf) {
      numbers += rows.prefixes.size() * m + columns->prefixes.size() * n;
    }
    const int64_t bytes = numbers * int64_t(sizeof(double));
    if (bytes > spare) {
      // So many lengths at a time, in whole groups of lanes.
      const int64_t lanes = loops<T>().lanes;
      part_ = std::max<int64_t>(lanes, n * spare / bytes / lanes * lanes);
    } else {
      part_ = n;
    }
    // Parts take turns at every tile. There is one only then: they are for few, long samples.
    const int64_t size = part_ < n ? INT64_MAX : kBlock;
    rows.cut(size);
    if (!symmetric) {
      columns->cut(size);
    }
    if ((normalize & kSelf) && (normalize & kCount)) {
      const int64_t last = std::max(rows.lengths.back(), columns->lengths.back());
      own_count_.resize(last + 1);
      delannoy(last, last, [&](int64_t length, const auto& log) { own_count_[length] = log(length); });
    }
  }

  gak::Lane lane(int64_t column, int64_t length, int64_t total) const {
    return {column, length, bandwidths_[total].scale, bandwidths_[total].extended};
  }

  // All pairs. `tile_of` gives the squared distances of two blocks; of a block with itself, of the pairs of samples in
  // their order, and of each sample with itself in both directions. Without symmetry no tile holds the latter: then
  // `own` computes the self-kernels of some prefixes of a side.
  template <typename TileOf, typename Own>
  void run(const TileOf& tile_of, const Own& own, T* result) {
    const int64_t count = rows.lengths.size();
    Table of_rows, of_columns;
    for (int64_t first = 0; first < count; first += part_) {
      const int64_t last = std::min(first + part_, count);
      const int64_t first_column = symmetric ? first : 0;
      if (normalize & kCount) {
        count_alignments(first, last, first_column);
      }
      if (normalize & kSelf) {
        int64_t begin = 0, end = rows.prefixes.size();
        if (part_ < count) {
          const Block near = rows.within(rows.blocks[0], first, last);
          begin = near.begin;
          end = near.end;
        }
        of_rows.reset(begin, end, first_column, columns->lengths.size());
        of_columns.reset(symmetric ? end : 0, columns->prefixes.size(), first, last);
        if (!symmetric) {
          own(rows, begin, end, *columns, of_rows);
          own(*columns, 0, columns->prefixes.size(), rows, of_columns);
        }
      }
      if (!symmetric) {
        for (const Block& a : rows.blocks) {
          for (const Block& b : columns->blocks) {
            kernels(rows.within(a, first, last), b, tile_of(a, b), of_rows, of_columns, result);
          }
        }
        continue;
      }
      // Blocks against themselves first: they hold the self-kernels that all others are divided by.
      for (const Block& a : rows.blocks) {
        const Block near = rows.within(a, first, last), rest = rows.within(a, last, count);
        const gak::Tile<T> tile = tile_of(a, a);
        if (normalize & kSelf) {
          self_kernels(near, tile, of_rows);
          self_kernels(rest, tile, of_columns);
        }
        kernels(near, near, tile, of_rows, of_rows, result);
        kernels(near, rest, tile, of_rows, of_columns, result);
        kernels(rest, near, tile, of_columns, of_rows, result);
      }
      for (size_t i = 0; i < rows.blocks.size(); ++i) {
        for (size_t j = i + 1; j < rows.blocks.size(); ++j) {
          kernels(rows.blocks[i], rows.blocks[j], tile_of(rows.blocks[i], rows.blocks[j]), of_rows, of_rows, result);
        }
      }
    }
  }

  // Self-kernels of one prefix, at the bandwidths of the table. Its sample begins at row and column `at`.
  void self_kernels(
      const Side<T>& side, int64_t p, const Side<T>& partners, gak::Tile<T> tile, int64_t at, Table& table,
      Workspace& workspace) const {
    const int64_t n = side.prefixes[p].length;
    std::vector<gak::Lane> lanes;
    lanes.reserve(table.width);
    for (int64_t l = table.first_length; l < table.first_length + table.width; ++l) {
      // The pair's bandwidth, but n slices against n.
      const double scale = bandwidths_[n + partners.lengths[l]].scale;
      lanes.push_back({at, n, scale, needs_exponents(2 * n, scale)});
    }
    double* values = table.of(p);
    loops<T>().log_kernels(
        tile.from(at), n, lanes.data(), lanes.size(), workspace.reserve((side.lengths.back() + 1) * loops<T>().row_bytes),
        values);
    for (int64_t l = 0; !own_count_.empty() && l < table.width; ++l) {
      values[l] -= own_count_[n];
    }
  }

  Side<T> rows;
  Side<T>* columns;
  bool symmetric;
  double delta;
  int64_t normalize;

 private:
  // So many threads that their workspaces stay in proportion.
  int64_t threads(int64_t longest) const {
    const int64_t bytes = (longest + 1) * loops<T>().row_bytes;
    return std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, spare_ / bytes));
  }

  // From the tile of a block with itself.
  void self_kernels(const Block& block, gak::Tile<T> tile, Table& table) const {
    in_turn(threads(rows.lengths.back()), block.end - block.begin, [&](int64_t, const auto& next) {
      Workspace workspace;
      for (int64_t i; next(i);) {
        const int64_t p = block.end - 1 - i;  // the longest first
        self_kernels(rows, p, rows, tile, rows.prefixes[p].start - block.first_slice, table, workspace);
      }
    });
  }

  // Some prefixes of one pair of blocks.
  void kernels(
      const Block& a, const Block& b, gak::Tile<T> tile, const Table& of_rows, const Table& of_columns,
      T* result) const {
    const bool diagonal = symmetric && a.first_slice == b.first_slice;
    const int64_t q_count = columns->prefixes.size();
    in_turn(threads(columns->lengths.back()), a.end - a.begin, [&](int64_t, const auto& next) {
      Workspace workspace;
      std::vector<int64_t> partners;
      std::vector<gak::Lane> lanes;
      std::vector<double> values;
      partners.reserve(b.end - b.begin);
      lanes.reserve(b.end - b.begin);
      for (int64_t i; next(i);) {
        const int64_t p = a.end - 1 - i;  // the longest first
        const Prefix& row = rows.prefixes[p];
        partners.clear();
        lanes.clear();
        for (int64_t q = b.begin; q < b.end; ++q) {
          const Prefix& column = columns->prefixes[q];
          if (diagonal && q == p && (normalize & kSelf)) {
            result[row.out * q_count + row.out] = 0;
            continue;
          }
          if (diagonal && (column.sample == row.sample ? q < p : column.sample < row.sample)) {
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
            workspace.reserve((columns->prefixes[b.end - 1].length + 1) * loops<T>().row_bytes), values.data());
        for (size_t k = 0; k < partners.size(); ++k) {
          const int64_t q = partners[k];
          const Prefix& column = columns->prefixes[q];
          const int64_t n = rows.length_index[row.length], m = columns->length_index[column.length];
          double divisor = 0;
          if (normalize & kSelf) {
            divisor += 0.5 * (of_rows.at(p, m) + of_columns.at(q, n));
          }
          if (normalize & kCount) {
            // With symmetry the shorter length, which is known to lie in the part, comes first.
            divisor += symmetric ? counts_.at(std::min(n, m), std::max(n, m)) : counts_.at(n, m);
          }
          const T value = T(values[k] - divisor);
          result[row.out * q_count + column.out] = value;
          if (symmetric) {
            result[column.out * q_count + row.out] = value;
          }
        }
      }
    });
  }

  void count_alignments(int64_t first, int64_t last, int64_t first_column) {
    counts_.reset(first, last, first_column, columns->lengths.size());
    int64_t index = first;
    delannoy(rows.lengths[last - 1], columns->lengths.back(), [&](int64_t length, const auto& log) {
      if (length == rows.lengths[index]) {
        double* values = counts_.of(index++);
        for (int64_t l = first_column; l < first_column + counts_.width; ++l) {
          *values++ = log(columns->lengths[l]);
        }
      }
    });
  }

  std::vector<Side<T>> other_;
  int64_t spare_;
  int64_t part_;  // lengths whose self-kernels and counts are held at a time
  Table counts_;                   // (lengths of rows, lengths of columns)
  std::vector<double> own_count_;  // of each length with itself, for "self+count"
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

// c = a @ b^T, or what is added to c, with the BLAS of torch.
template <typename T>
void product(const T* a, const T* b, T* c, int64_t n, int64_t m, int64_t d, int64_t stride, bool add) {
  const Tensor left = view(const_cast<T*>(a), n, d, d, 1), right = view(const_cast<T*>(b), d, m, 1, d);
  const Tensor result = view(c, n, m, stride, 1);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), add ? 1 : 0, 1));
}

template <typename T>
struct Slices {
  const void* embeddings;
  ScalarType type;
  const int64_t* modality;
  const int64_t* offsets;
  int64_t count, samples, d;
  int64_t widths[2];  // of the halves
  bool narrow;
  // x * lift * factor has length 1: two steps, because the factor of a denormal number would itself be infinite.
  struct Norm {
    double lift = 1, factor = 1;
  };
  std::vector<Norm> norms;  // of the halves of each slice

  Slices(const Tensor& tensor, const std::optional<Tensor>& modality, int64_t split, const int64_t* offsets, int64_t samples)
      : embeddings(tensor.const_data_ptr()),
        type(tensor.scalar_type()),
        modality(modality ? static_cast<const int64_t*>(modality->const_data_ptr()) : nullptr),
        offsets(offsets),
        count(tensor.size(0)),
        samples(samples),
        d(tensor.size(1)),
        widths{modality ? split : d, modality ? d - split : 0},
        narrow(type != kType<T>) {}

  bool text(int64_t slice) const {
    return !modality || modality[slice] == 0;
  }

  int64_t sample_of(int64_t slice) const {
    return std::upper_bound(offsets, offsets + samples, slice) - offsets - 1;
  }

  void arrange(Side<T>& side) const {
    side.place.resize(side.slices);
    side.source.resize(side.slices);
    int64_t sample = 0;
    for (Block& block : side.blocks) {
      int64_t front = block.first_slice;
      for (int pass = 0; pass < 2; ++pass) {
        int64_t s = sample;
        for (; s < samples && (side.need[s] == 0 || side.start[s] < block.last_slice); ++s) {
          for (int64_t i = 0; i < side.need[s]; ++i) {
            if (text(offsets[s] + i) == (pass == 0)) {
              side.source[front] = offsets[s] + i;
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

  // Some dimensions of a slice in T, copied only where its dtype is narrow.
  const T* dimensions(int64_t slice, int64_t from, int64_t size, T* buffer) const {
    const int64_t at = slice * d + from;
    if (!narrow) {
      return static_cast<const T*>(embeddings) + at;
    }
    const auto widen = type == ScalarType::BFloat16 ? loops<T>().widen_brain : loops<T>().widen_half;
    widen(static_cast<const uint16_t*>(embeddings) + at, size, buffer);
    return buffer;
  }

  // `problem` is 0, 1 for NaN or infinity, `complaint` for zeros.
  static Norm norm(const T* x, int64_t width, int complaint, int& problem) {
    double squares = loops<T>().sum_of_squares(x, width);
    const double smallest = sizeof(T) == 8 ? 1e-290 : 1e-25, largest_squares = sizeof(T) == 8 ? 1e300 : 1e35;
    Norm norm;
    if (!(squares < largest_squares && squares > smallest)) {
      double largest = 0;
      for (int64_t i = 0; i < width; ++i) {
        const double size = x[i] < 0 ? -double(x[i]) : double(x[i]);
        if (!(size <= 1.7976931348623157e308)) {
          problem = 1;
          return norm;
        }
        largest = std::max(largest, size);
      }
      if (largest == 0) {
        problem = complaint;
        return norm;
      }
      norm.lift = largest < 1e-300 ? 1e300 : 1 / largest;
      squares = 0;
      for (int64_t i = 0; i < width; ++i) {
        squares += x[i] * norm.lift * (x[i] * norm.lift);
      }
    }
    norm.factor = 1 / __builtin_sqrt(squares);
    return norm;
  }

  static void scale(const T* x, int64_t width, const Norm& norm, T* result) {
    if (norm.lift == 1) {
      loops<T>().scale(x, width, norm.factor, result);
      return;
    }
    for (int64_t i = 0; i < width; ++i) {
      result[i] = T(x[i] * norm.lift * norm.factor);
    }
  }

  // The norms of all slices, or an error for what has none.
  void measure() {
    std::atomic<int64_t> bad{INT64_MAX};
    norms.resize(2 * count);
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      std::vector<T> widened(narrow ? d : 0);
      for (int64_t i = begin; i < end; ++i) {
        const T* x = dimensions(i, 0, d, widened.data());
        int problem = 0;
        for (int half = 0; half < 2 && widths[half] && !problem; x += widths[half++]) {
          norms[2 * i + half] = norm(x, widths[half], half ? 4 : widths[1] ? 3 : 2, problem);
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
      const int64_t row = code / 8, sample = sample_of(row);
      const std::string edge = std::to_string(widths[0]);
      const std::string what[] = {
          "", "holds NaN or infinity", "is all zeros and has no direction",
          "is all zeros in its first " + edge + " dimensions", "is all zeros after its first " + edge + " dimensions"};
      STD_TORCH_CHECK(
          false, "Slice ", row - offsets[sample], " of sequence ", sample, " (row ", row,
          " of the packed embeddings) ", what[code % 8], ".");
    }
  }

  // Some dimensions of a half of a slice, normalised.
  void unit(int64_t slice, int half, int64_t from, int64_t size, T* result) const {
    scale(dimensions(slice, (half ? widths[0] : 0) + from, size, result), size, norms[2 * slice + half], result);
  }

  // The same of the slices that stand in some rows of a side.
  void units(const Side<T>& side, int64_t first, int64_t last, int half, int64_t from, int64_t size, T* result) const {
    const int64_t bytes = narrow ? 2 : sizeof(T), start = (half ? widths[0] : 0) + from;
    for (int64_t row = first; row < last; ++row, result += size) {
      // They lie anywhere: the hardware does not guess the next one.
      const char* next = static_cast<const char*>(embeddings) + (side.source[std::min(row + 1, last - 1)] * d + start) * bytes;
      for (int64_t at = 0; at < size * bytes; at += 64) {
        __builtin_prefetch(next + at);
      }
      unit(side.source[row], half, from, size, result);
    }
  }

  // Squared distances of two blocks, texts before images. Of a block with itself, what pairs of samples in their order
  // need, and each sample with itself in both directions.
  void distances(const Op<T>& op, const Block& a, const Block& b, Multiplier<T>& multiplier, T* tile) const {
    const int64_t height = a.last_slice - a.first_slice, width = b.last_slice - b.first_slice;
    const bool diagonal = op.symmetric && a.first_slice == b.first_slice;
    std::vector<Piece> pieces;
    const auto cut = [&](int half, int64_t top, int64_t bottom, int64_t left, int64_t right, bool triangle) {
      for (int64_t j = left; j < right; j += multiplier.columns) {
        const int64_t end = std::min(j + multiplier.columns, right);
        for (int64_t i = top; i < (triangle ? end : bottom); i += kStrip) {
          pieces.push_back({half, i, std::min(i + kStrip, bottom), j, triangle ? std::max(i, j) : j, end, false});
        }
      }
    };
    cut(0, 0, a.texts, 0, b.texts, diagonal);
    cut(0, a.texts, height, b.texts, width, diagonal);
    cut(1, 0, a.texts, b.texts, width, false);
    if (!diagonal) {
      cut(1, a.texts, height, 0, b.texts, false);
    }
    // Calls `use(piece, left, right, size, first, last)` with some dimensions of its normalised slices, until it had all.
    const auto multiply = [&](const auto& use) {
      multiplier.run(pieces.size(), [&](int64_t i, Multiplied<T>& mine) {
        Piece& piece = pieces[i];
        const int64_t full = widths[piece.half];
        // Where the diagonal passes through, the rows are some of the columns.
        const bool within = diagonal && piece.half == 0 && piece.top >= piece.panel;
        for (int64_t from = 0; from < full; from += multiplier.step) {
          const int64_t size = std::min(multiplier.step, full - from);
          if (!mine.holds(1, piece.half, from, piece.panel, piece.right)) {
            units(*op.columns, b.first_slice + piece.panel, b.first_slice + piece.right, piece.half, from, size, mine.right);
          }
          if (!within && !mine.holds(0, piece.half, from, piece.top, piece.bottom)) {
            units(op.rows, a.first_slice + piece.top, a.first_slice + piece.bottom, piece.half, from, size, mine.left);
          }
          const T* left = within ? mine.right + (piece.top - piece.panel) * size : mine.left;
          use(piece, left, mine.right + (piece.left - piece.panel) * size, size, from == 0, from + size == full);
        }
        if (diagonal) {
          mirror(op.rows, a, piece, tile);
        }
      });
    };
    multiply([&](Piece& piece, const T* left, const T* right, int64_t size, bool first, bool last) {
      product(
          left, right, tile + piece.top * width + piece.left, piece.bottom - piece.top, piece.right - piece.left, size, width,
          !first);
      if (last) {
        piece.close = from_cosines(piece, diagonal, width, tile);
      }
    });
    pieces.erase(
        std::remove_if(pieces.begin(), pieces.end(), [](const Piece& piece) { return !piece.close; }), pieces.end());
    multiply([&](Piece& piece, const T* left, const T* right, int64_t size, bool, bool last) {
      for (int64_t r = piece.top; r < piece.bottom; ++r) {
        T* row = tile + r * width;
        for (int64_t c = piece.first(r, diagonal); c < piece.right; ++c) {
          if (__builtin_signbit(row[c])) {
            const T distance =
                loops<T>().squared_distance(left + (r - piece.top) * size, right + (c - piece.left) * size, size) - row[c];
            row[c] = last ? distance : -distance;
          }
        }
      }
    });
  }

  // What is too close is marked by its sign, and holds what is known of its distance from then on. Whether there is any.
  static bool from_cosines(const Piece& piece, bool diagonal, int64_t width, T* tile) {
    bool close = false;
    for (int64_t r = piece.top; r < piece.bottom; ++r) {
      T* row = tile + r * width;
      const int64_t first = piece.first(r, diagonal);
      if (loops<T>().distances(row + first, piece.right - first) >= kClose) {
        continue;
      }
      for (int64_t c = first; c < piece.right; ++c) {
        if (row[c] < kClose) {
          const bool itself = diagonal && r == c;
          row[c] = itself ? T(0) : -T(0);
          close |= !itself;
        }
      }
    }
    return close;
  }

  // To the columns below the diagonal of a block with itself: images with texts, or every sample with itself.
  void mirror(const Side<T>& side, const Block& block, const Piece& piece, T* tile) const {
    const int64_t size = block.last_slice - block.first_slice;
    if (piece.half) {
      for (int64_t c = piece.left; c < piece.right; ++c) {
        for (int64_t r = piece.top; r < piece.bottom; ++r) {
          tile[c * size + r] = tile[r * size + c];
        }
      }
      return;
    }
    const int64_t* source = side.source.data() + block.first_slice;
    for (int64_t r = piece.top; r < piece.bottom; ++r) {
      const int64_t sample = sample_of(source[r]), end = offsets[sample] + side.need[sample];
      // The slices of a sample that are of one modality stand side by side.
      for (int64_t c = std::max(r + 1, piece.left); c < piece.right && source[c] < end; ++c) {
        tile[c * size + r] = tile[r * size + c];
      }
    }
  }

  // Without symmetry no tile holds a sample against itself. `memory` has room for `most` distances, the longest sample's at
  // least.
  void self_kernels(
      const Op<T>& op, const Side<T>& side, int64_t first, int64_t last, const Side<T>& partners, Table& table,
      Multiplier<T>& multiplier, T* memory, int64_t most) const {
    std::vector<std::vector<int64_t>> prefixes(samples);
    std::vector<int64_t> longest(samples, 0), present;
    for (int64_t p = first; p < last; ++p) {
      const int64_t sample = side.prefixes[p].sample;
      if (prefixes[sample].empty()) {
        present.push_back(sample);
      }
      prefixes[sample].push_back(p);
      longest[sample] = std::max(longest[sample], side.prefixes[p].length);
    }
    std::vector<int64_t> place(samples);
    for (size_t begin = 0, end = 0; begin < present.size(); begin = end) {
      int64_t cells = 0;
      for (; end < present.size(); ++end) {
        const int64_t n = longest[present[end]];
        if (cells + n * n > most) {
          break;
        }
        place[present[end]] = cells;
        cells += n * n;
      }
      std::fill(memory, memory + cells, T(0));
      multiplier.run(end - begin, [&](int64_t i, Multiplied<T>& mine) {
        const int64_t sample = present[begin + i], n = longest[sample];
        T* own = memory + place[sample];
        with_itself(sample, n, own, mine.left, std::max<int64_t>(1, multiplier.room / n));
        Workspace workspace;
        for (int64_t p : prefixes[sample]) {
          op.self_kernels(side, p, partners, {own, n}, 0, table, workspace);
        }
      });
    }
  }

  // Adds the squared distances of the first n slices of a sample, so many dimensions at a time.
  void with_itself(int64_t sample, int64_t n, T* own, T* buffer, int64_t step) const {
    const int64_t start = offsets[sample];
    for (int half = 0; half < 2; ++half) {
      for (int64_t from = 0; from < widths[half]; from += step) {
        const int64_t size = std::min(step, widths[half] - from);
        for (int64_t i = 0; i < n; ++i) {
          unit(start + i, half, from, size, buffer + i * size);
          for (int64_t j = 0; j < i; ++j) {
            if ((text(start + i) == text(start + j)) == (half == 0)) {
              own[i * n + j] += loops<T>().squared_distance(buffer + i * size, buffer + j * size, size);
              own[j * n + i] = own[i * n + j];
            }
          }
        }
      }
    }
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

// What self-kernels and counts may take, next to a matrix of squared distances and the inputs.
int64_t spare_bytes(int64_t bytes) {
  return std::max<int64_t>(bytes / 8, 1 << 17);
}

template <typename T>
void log_alignment(
    const Tensor& embeddings, const Tensor& offsets, int64_t samples, const Tensor& prefixes,
    const std::optional<Tensor>& others, const std::optional<Tensor>& modality, int64_t split, double delta,
    int64_t normalize, Tensor& result) {
  const int64_t* starts = static_cast<const int64_t*>(offsets.const_data_ptr());
  Slices<T> slices(embeddings, modality, split, starts, samples);
  const int64_t numbers = slices.count * slices.count + result.size(0) * result.size(1);
  Op<T> op(
      prefixes, others, starts, samples, true, delta, normalize,
      spare_bytes(numbers * sizeof(T) + slices.count * slices.d * (slices.narrow ? 2 : sizeof(T))));
  slices.measure();
  slices.arrange(op.rows);
  if (!op.symmetric) {
    slices.arrange(*op.columns);
  }
  int64_t height = 0, width = 0, longest = 0;
  for (const Block& block : op.rows.blocks) {
    height = std::max(height, block.last_slice - block.first_slice);
  }
  for (const Block& block : op.columns->blocks) {
    width = std::max(width, block.last_slice - block.first_slice);
  }
  if (!op.symmetric && (normalize & kSelf)) {
    longest = std::max(op.rows.lengths.back(), op.columns->lengths.back());
  }
  // One tile, or distances inside some samples.
  const int64_t size = std::max(height * width, longest * longest);
  std::unique_ptr<T[]> memory(new T[size]);
  Multiplier<T> multiplier(
      height, width, std::max(slices.widths[0], slices.widths[1]),
      slices.count * slices.d * (slices.narrow ? 2 : sizeof(T)), longest);
  std::pair<int64_t, int64_t> held{-1, -1};
  const auto tile_of = [&](const Block& a, const Block& b) -> gak::Tile<T> {
    const std::pair<int64_t, int64_t> wanted{a.first_slice, b.first_slice};
    if (held != wanted) {
      slices.distances(op, a, b, multiplier, memory.get());
      held = wanted;
    }
    return {
        memory.get(), b.last_slice - b.first_slice, op.rows.place.data() + a.first_slice,
        op.columns->place.data() + b.first_slice};
  };
  const auto own = [&](const Side<T>& side, int64_t first, int64_t last, const Side<T>& partners, Table& table) {
    held = {-1, -1};
    slices.self_kernels(op, side, first, last, partners, table, multiplier, memory.get(), size);
  };
  op.run(tile_of, own, static_cast<T*>(result.mutable_data_ptr()));
}

template <typename T>
void log_recursion(
    const Tensor& distances, const Tensor& offsets, int64_t samples, const Tensor& prefixes,
    const std::optional<Tensor>& others, double delta, int64_t normalize, Tensor& result) {
  const T* matrix = static_cast<const T*>(distances.const_data_ptr());
  const int64_t stride = distances.size(0);
  Op<T> op(
      prefixes, others, static_cast<const int64_t*>(offsets.const_data_ptr()), samples, false, delta, normalize,
      spare_bytes((distances.numel() + result.numel()) * sizeof(T)));
  const auto own = [&](const Side<T>& side, int64_t first, int64_t last, const Side<T>& partners, Table& table) {
    in_turn(torch::stable::get_num_threads(), last - first, [&](int64_t, const auto& next) {
      Workspace workspace;
      for (int64_t i; next(i);) {
        const int64_t p = last - 1 - i;  // the longest first
        op.self_kernels(side, p, partners, {matrix, stride}, side.prefixes[p].start, table, workspace);
      }
    });
  };
  const auto tile_of = [&](const Block& a, const Block& b) -> gak::Tile<T> {
    return {matrix + a.first_slice * stride + b.first_slice, stride};
  };
  op.run(tile_of, own, static_cast<T*>(result.mutable_data_ptr()));
}

template <typename T>
void log_recursion_backward(
    const Tensor& upstream, const Tensor& distances, const Tensor& offsets, int64_t samples, const Tensor& prefixes,
    const std::optional<Tensor>& others, double delta, int64_t normalize, Tensor& result) {
  Op<T> op(
      prefixes, others, static_cast<const int64_t*>(offsets.const_data_ptr()), samples, false, delta, normalize & kSelf,
      INT64_MAX);
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
  in_turn(torch::stable::get_num_threads(), samples, [&](int64_t, const auto& next) {
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
    for (int64_t sample; next(sample);) {
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
