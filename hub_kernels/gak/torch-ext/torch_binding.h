#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>

torch::stable::Tensor gak_log_alignment(
    const torch::stable::Tensor& embeddings, const torch::stable::Tensor& offsets,
    const torch::stable::Tensor& prefixes, const std::optional<torch::stable::Tensor>& others,
    const std::optional<torch::stable::Tensor>& modality, int64_t split, double delta, int64_t normalize);

torch::stable::Tensor gak_log_recursion(
    const torch::stable::Tensor& distances, const torch::stable::Tensor& offsets,
    const torch::stable::Tensor& prefixes, const std::optional<torch::stable::Tensor>& others, double delta,
    int64_t normalize);

torch::stable::Tensor gak_log_recursion_backward(
    const torch::stable::Tensor& gradient, const torch::stable::Tensor& distances,
    const torch::stable::Tensor& offsets, const torch::stable::Tensor& prefixes,
    const std::optional<torch::stable::Tensor>& others, double delta, int64_t normalize);

torch::stable::Tensor gak_expected_alignment(const torch::stable::Tensor& distances, double delta);

torch::stable::Tensor gak_log_pairs(
    const torch::stable::Tensor& distances, const torch::stable::Tensor& row_start,
    const torch::stable::Tensor& row_length, const torch::stable::Tensor& column_start,
    const torch::stable::Tensor& column_length, double delta, bool own, bool symmetric);

torch::stable::Tensor gak_log_pairs_backward(
    const torch::stable::Tensor& gradient, const torch::stable::Tensor& distances,
    const torch::stable::Tensor& row_start, const torch::stable::Tensor& row_length,
    const torch::stable::Tensor& row_group, const torch::stable::Tensor& column_start,
    const torch::stable::Tensor& column_length, const torch::stable::Tensor& column_group, int64_t longest_row,
    int64_t longest_column, double delta, bool own, bool expected_only);
