#include "torch_binding.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>

#define GAK_CONCAT_(a, b) a##b
#define GAK_CONCAT(a, b) GAK_CONCAT_(a, b)
#define GAK_STRING_(a) #a
#define GAK_STRING(a) GAK_STRING_(a)
// Expands the name before the library macro pastes it.
#define GAK_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define GAK_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

GAK_LIBRARY(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "log_alignment(Tensor embeddings, Tensor offsets, Tensor prefixes, Tensor? others, Tensor? modality, int split, "
      "float delta, int normalize) -> Tensor");
  ops.def(
      "log_recursion(Tensor distances, Tensor offsets, Tensor prefixes, Tensor? others, float delta, int normalize) "
      "-> Tensor");
  ops.def(
      "log_recursion_backward(Tensor gradient, Tensor distances, Tensor offsets, Tensor prefixes, Tensor? others, "
      "float delta, int normalize) -> Tensor");
  // The CUDA backend has these two only; the others are the CPU's.
  ops.def(
      "log_pairs(Tensor distances, Tensor row_start, Tensor row_length, Tensor column_start, Tensor column_length, "
      "float delta, bool own, bool symmetric) -> Tensor");
  ops.def(
      "log_pairs_backward(Tensor gradient, Tensor distances, Tensor row_start, Tensor row_length, Tensor row_group, "
      "Tensor column_start, Tensor column_length, Tensor column_group, int longest_row, int longest_column, "
      "float delta, bool own, bool expected_only) -> Tensor");
  ops.def("expected_alignment(Tensor distances, float delta) -> Tensor");
}

#if defined(CPU_KERNEL)
GAK_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("log_alignment", TORCH_BOX(&gak_log_alignment));
  ops.impl("log_recursion", TORCH_BOX(&gak_log_recursion));
  ops.impl("log_recursion_backward", TORCH_BOX(&gak_log_recursion_backward));
  ops.impl("expected_alignment", TORCH_BOX(&gak_expected_alignment));
}
#else
GAK_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("log_pairs", TORCH_BOX(&gak_log_pairs));
  ops.impl("log_pairs_backward", TORCH_BOX(&gak_log_pairs_backward));
}
#endif

// Lets Python import the library as a module, which loads it and so registers the ops.
PyMODINIT_FUNC GAK_CONCAT(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, GAK_STRING(TORCH_EXTENSION_NAME), nullptr, 0, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
