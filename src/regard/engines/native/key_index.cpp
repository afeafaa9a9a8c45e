// a graph over keys, from the keys that queries have in common; compiled once per instruction set, REGARD_INDEX names it
//
// Every step gives the same graph for any number of threads: threads write rows of their own from what the step before
// left, and what hangs on order (ties, connecting) goes by score and then by the number of the key, or is done by one.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "key_index.hpp"

#include "arena.hpp"
#include "vec.hpp"

namespace {

thread_local Arena own, shared;

// places of a row of links that only connecting fills: each key that is joined brings more than it takes
constexpr long SPARE = 2;
// keys found for one that is to be connected
constexpr long NEAR = 16, NEAR_EFFORT = 24;

INLINE float dot(const float* a, const float* b, long width) {
  V x = zero(), y = zero();
  long i = 0;
  for (; i + 2 * W <= width; i += 2 * W) {
    x = fma(load(a + i), load(b + i), x);
    y = fma(load(a + i + W), load(b + i + W), y);
  }
  for (; i < width; i += W) x = fma(load(a + i), load(b + i), x);
  return total(x + y);
}

// (score, key) as a number that is smaller the better, ties by key; bit 0 is free
INLINE uint64_t packed(float score, long id) {
  uint32_t bits;
  memcpy(&bits, &score, 4);
  bits = bits >> 31 ? bits : ~(bits | 0x80000000u);
  return (uint64_t)bits << 32 | (uint64_t)id << 1;
}
INLINE long id_of(uint64_t found) { return (long)((uint32_t)found >> 1); }

// heap sort, ascending: candidates are few, and the library's would be shared between instruction sets
INLINE void sift(uint64_t* x, long root, long count) {
  uint64_t moved = x[root];
  for (long child; (child = 2 * root + 1) < count; root = child) {
    if (child + 1 < count && x[child + 1] > x[child]) child++;
    if (x[child] <= moved) break;
    x[root] = x[child];
  }
  x[root] = moved;
}
INLINE void sort(uint64_t* x, long count) {
  for (long i = count / 2; i-- > 0;) sift(x, i, count);
  for (long i = count; i-- > 1;) {
    uint64_t last = x[i];
    x[i] = x[0];
    x[0] = last;
    sift(x, 0, i);
  }
}

class Seen {
 public:
  void carve(Arena& arena, long count) {
    words_ = (count + 63) / 64;
    bits_ = arena.take<uint64_t>(words_);
  }
  void clear() { memset(bits_, 0, words_ * 8); }
  bool add(long i) {
    uint64_t bit = (uint64_t)1 << (i & 63), &word = bits_[i >> 6];
    bool fresh = !(word & bit);
    word |= bit;
    return fresh;
  }
  bool has(long i) const { return bits_[i >> 6] >> (i & 63) & 1; }

 private:
  uint64_t* bits_;
  long words_;
};

// which keys a key is linked to: the nearest that are not nearer to one already taken, then the nearest of the others
struct Prune {
  const IndexProblem& p;
  Seen seen;
  uint64_t *near, *left;
  long count;

  explicit Prune(const IndexProblem& problem) : p(problem) {}

  void carve(Arena& arena) {
    seen.carve(arena, p.count);
    near = arena.take<uint64_t>(p.count);
    left = arena.take<uint64_t>(p.count);
  }

  void begin(long pivot) {
    count = 0;
    seen.clear();
    seen.add(pivot);
  }

  void offer(long pivot, long id) {
    if (id >= 0 && seen.add(id)) near[count++] = packed(nearness(pivot, id) - p.half[id], id);
  }

  void run(long pivot, int32_t* to, long room) {
    sort(near, count);
    long kept = 0, rest = 0;
    for (long i = 0; i < count && kept < room; i++) {
      long id = id_of(near[i]);
      float bar = nearness(id, pivot) - p.half[pivot];
      bool hidden = false;
      for (long j = 0; j < kept && !hidden; j++) hidden = nearness(id, to[j]) - p.half[to[j]] > bar;
      if (hidden)
        left[rest++] = near[i];
      else
        to[kept++] = (int32_t)id;
    }
    for (long i = 0; i < rest && kept < room; i++) to[kept++] = (int32_t)id_of(left[i]);
    for (; kept < room; kept++) to[kept] = -1;
  }

 private:
  float nearness(long a, long b) const { return dot(p.keys + a * p.width, p.keys + b * p.width, p.width); }
};

// best first from the entry: the `effort` best found are followed, and more while fewer than `least` were found
struct Walk {
  const IndexProblem& p;
  Seen seen;
  uint64_t* pool;
  long found, scanned, room;

  Walk(const IndexProblem& problem, long pool_size) : p(problem), room(pool_size) {}

  void carve(Arena& arena) {
    seen.carve(arena, p.count);
    pool = arena.take<uint64_t>(room + 1);
  }

  void run(const float* query, const float* half, long least, long effort) {
    seen.clear();
    found = scanned = 0;
    seen.add(p.entry);
    put(query, half, p.entry);
    for (long next = 0; next < found && (next < effort || found < least);) {
      if (pool[next] & 1) {
        next++;
        continue;
      }
      pool[next] |= 1;
      const int32_t* row = p.links + id_of(pool[next]) * p.degree;
      long lowest = next + 1;
      for (long i = 0; i < p.degree && row[i] >= 0; i++) {
        if (i + 4 < p.degree && row[i + 4] >= 0) __builtin_prefetch(p.keys + row[i + 4] * p.width);
        if (!seen.add(row[i])) continue;
        long place = put(query, half, row[i]);
        if (place < lowest) lowest = place;
      }
      next = lowest;
    }
  }

 private:
  long put(const float* query, const float* half, long id) {
    scanned++;
    float score = dot(query, p.keys + id * p.width, p.width);
    uint64_t x = packed(half ? score - half[id] : score, id);
    if (found == room && x > pool[found - 1]) return room;
    long low = 0, high = found;
    while (low < high) {
      long mid = (low + high) / 2;
      if (pool[mid] < x)
        low = mid + 1;
      else
        high = mid;
    }
    long moved = (found < room ? found : room - 1) - low;
    memmove(pool + low + 1, pool + low, moved * sizeof(uint64_t));
    pool[low] = x;
    if (found < room) found++;
    return low;
  }
};

int project(const IndexProblem& p) {
  int failed = OK;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Prune prune(p);
    if (!own.fill([&](Arena& arena) { prune.carve(arena); })) {
      __atomic_store_n(&failed, (int)NO_MEMORY, __ATOMIC_RELAXED);
    } else {
#pragma omp for schedule(dynamic, 16)
      for (long i = 0; i < p.affected; i++) {
        long pivot = p.pivots[i];
        prune.begin(pivot);
        for (long r = p.pivot_start[i]; r < p.pivot_start[i + 1]; r++)
          for (long j = 0; j < p.listed; j++) prune.offer(pivot, p.lists[p.pivot_row[r] * p.listed + j]);
        prune.run(pivot, p.forward + pivot * p.spread, p.spread);
      }
    }
  }
  return failed;
}

// the keys that each key is linked from: start (count + 1), from (links)
struct Backward {
  int64_t* start;
  int32_t* from;

  static long links(const IndexProblem& p) {
    long n = 0;
    for (long i = 0; i < p.count * p.spread; i++) n += p.forward[i] >= 0;
    return n;
  }

  void carve(Arena& arena, long count, long links) {
    start = arena.take<int64_t>(count + 2);
    from = arena.take<int32_t>(links);
  }

  void fill(const IndexProblem& p) {
    memset(start, 0, (p.count + 2) * sizeof(int64_t));
    for (long i = 0; i < p.count * p.spread; i++)
      if (p.forward[i] >= 0) start[p.forward[i] + 2]++;
    for (long i = 0; i < p.count; i++) start[i + 2] += start[i + 1];
    for (long i = 0; i < p.count; i++)
      for (long j = 0; j < p.spread && p.forward[i * p.spread + j] >= 0; j++)
        from[start[p.forward[i * p.spread + j] + 1]++] = (int32_t)i;
  }
};

// every key is joined to the graph that is reached from the entry
struct Connect {
  const IndexProblem& p;
  Seen reached;
  int32_t *queue, *lost, *close;
  long queued = 0, lost_count = 0, free = 0;

  explicit Connect(const IndexProblem& problem) : p(problem) {}

  void carve(Arena& arena) {
    reached.carve(arena, p.count);
    queue = arena.take<int32_t>(p.count);
    lost = arena.take<int32_t>(p.count);
    close = arena.take<int32_t>(p.count * NEAR);
  }

  void reach(long from) {
    if (!reached.add(from)) return;
    long at = queued;
    queue[queued++] = (int32_t)from;
    for (; at < queued; at++) {
      const int32_t* row = p.links + queue[at] * p.degree;
      for (long i = 0; i < p.degree && row[i] >= 0; i++)
        if (reached.add(row[i])) queue[queued++] = row[i];
    }
  }

  void begin() {
    reached.clear();
    reach(p.entry);
    for (long i = 0; i < p.count; i++)
      if (!reached.has(i)) lost[lost_count++] = (int32_t)i;
  }

  // a lost key and those near it, which are reached, learn of each other
  void join(long i) {
    long key = lost[i];
    int32_t* row = p.links + key * p.degree;
    for (long j = 0; j < NEAR && close[i * NEAR + j] >= 0; j++) link(row, close[i * NEAR + j], p.degree - SPARE);
    if (reached.has(key)) return;
    bool done = false;
    for (long j = 0; j < NEAR && close[i * NEAR + j] >= 0 && !done; j++)
      done = link(p.links + close[i * NEAR + j] * p.degree, key, p.degree);
    for (; !done; free += !done) done = link(p.links + queue[free] * p.degree, key, p.degree);
    reach(key);
  }

 private:
  bool link(int32_t* row, long to, long room) {
    for (long i = 0; i < room; i++) {
      if (row[i] == to) return true;
      if (row[i] < 0) {
        row[i] = (int32_t)to;
        return true;
      }
    }
    return false;
  }
};

int link(const IndexProblem& p) {
  int failed = OK;
  Backward backward;
  Connect connect(p);
  long links = Backward::links(p);
  if (!shared.fill([&](Arena& arena) {
        backward.carve(arena, p.count, links);
        connect.carve(arena);
      }))
    return NO_MEMORY;
  backward.fill(p);
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Prune prune(p);
    if (!own.fill([&](Arena& arena) { prune.carve(arena); })) {
      __atomic_store_n(&failed, (int)NO_MEMORY, __ATOMIC_RELAXED);
    } else {
#pragma omp for schedule(dynamic, 64)
      for (long i = 0; i < p.count; i++) {
        int32_t* row = p.links + i * p.degree;
        prune.begin(i);
        for (long j = 0; j < p.spread; j++) prune.offer(i, p.forward[i * p.spread + j]);
        for (long j = backward.start[i]; j < backward.start[i + 1]; j++) prune.offer(i, backward.from[j]);
        prune.run(i, row, p.degree - SPARE);
        for (long j = p.degree - SPARE; j < p.degree; j++) row[j] = -1;
      }
    }
  }
  if (failed) return failed;
  connect.begin();
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Walk walk(p, NEAR_EFFORT);
    if (!own.fill([&](Arena& arena) { walk.carve(arena); })) {
      __atomic_store_n(&failed, (int)NO_MEMORY, __ATOMIC_RELAXED);
    } else {
#pragma omp for schedule(dynamic, 64)
      for (long i = 0; i < connect.lost_count; i++) {
        walk.run(p.keys + connect.lost[i] * p.width, p.half, 1, NEAR_EFFORT);
        for (long j = 0; j < NEAR; j++) connect.close[i * NEAR + j] = j < walk.found ? (int32_t)id_of(walk.pool[j]) : -1;
      }
    }
  }
  if (failed) return failed;
  for (long i = 0; i < connect.lost_count; i++) connect.join(i);
  return OK;
}

int search(const IndexProblem& p) {
  int failed = OK;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1 && p.rows > 1)
  {
    Walk walk(p, p.k > p.effort ? p.k : p.effort);
    if (!own.fill([&](Arena& arena) { walk.carve(arena); })) {
      __atomic_store_n(&failed, (int)NO_MEMORY, __ATOMIC_RELAXED);
    } else {
#pragma omp for schedule(dynamic, 4)
      for (long i = 0; i < p.rows; i++) {
        walk.run(p.query + i * p.width, nullptr, p.k, p.effort);
        for (long j = 0; j < p.k; j++) p.ids[i * p.k + j] = j < walk.found ? id_of(walk.pool[j]) : -1;
        p.scanned[i] = walk.scanned;
      }
    }
  }
  return failed;
}

}  // namespace

const IndexKernels REGARD_INDEX = {project, link, search};
