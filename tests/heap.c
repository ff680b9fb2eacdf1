// Counts what a process holds, and the most it ever held, when it is loaded before the C library (LD_PRELOAD). Whatever
// asks the allocator is counted: tensors, numpy, and with PYTHONMALLOC=malloc every object of Python.
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);

static atomic_long held, most;

static void *counted(void *block) {
  if (block) {
    long size = malloc_usable_size(block), now = atomic_fetch_add(&held, size) + size, high = atomic_load(&most);
    while (now > high && !atomic_compare_exchange_weak(&most, &high, now)) {
    }
  }
  return block;
}

void *malloc(size_t size) { return counted(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }
void *memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **block, size_t alignment, size_t size) {
  *block = memalign(alignment, size);
  return *block ? 0 : ENOMEM;
}

void free(void *block) {
  if (block) atomic_fetch_sub(&held, malloc_usable_size(block));
  __libc_free(block);
}

void *realloc(void *block, size_t size) {
  long before = block ? malloc_usable_size(block) : 0;
  void *moved = __libc_realloc(block, size);
  if (moved || !size) atomic_fetch_sub(&held, before);
  return counted(moved);
}

long heap_held(void) { return held; }
long heap_most(void) { return most; }
void heap_reset(void) { most = held; }
