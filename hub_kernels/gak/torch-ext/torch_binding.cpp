#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

torch::stable::Tensor log_kernels(
    const torch::stable::Tensor& distances, const torch::stable::Tensor& row, const torch::stable::Tensor& column,
    const torch::stable::Tensor& n, const torch::stable::Tensor& m, const torch::stable::Tensor& total, double delta);

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)
// Expands the name before the library macro pastes it.
#define LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

LIBRARY(TORCH_EXTENSION_NAME, ops) {
  ops.def("log_kernels(Tensor distances, Tensor row, Tensor column, Tensor n, Tensor m, Tensor total, float delta) -> Tensor");
}

LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("log_kernels", TORCH_BOX(&log_kernels));
}

// Lets Python import the library as a module, which loads it and so registers the op.
PyMODINIT_FUNC CONCAT(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, STRING(TORCH_EXTENSION_NAME)};
  return PyModule_Create(&module);
}
