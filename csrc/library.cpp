// Private schemas: the same names and arguments as the public ones in kernels/erasediff_kernels/_library.py. Operators
// on lists tell whether they accepted them (`lists.h`); nothing was done where they did not.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(erasediff_C, m) {
  m.def("philox_bits(Tensor sample_ids, Tensor key, int role, int words) -> Tensor");
  m.def(
      "philox_noise(Tensor sample_ids, Tensor key, int role, int[] shape, str distribution, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "add_noise(Tensor sample, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? sample_ids, Tensor? key, int role) "
      "-> Tensor");
  m.def(
      "denoising_loss(Tensor prediction, Tensor sample, Tensor alpha, Tensor sigma, Tensor weight, Tensor? noise, "
      "Tensor? sample_ids, Tensor? key, int role, str prediction_type) -> (Tensor loss, Tensor grad)");
  m.def(
      "deviation_loss(Tensor prediction, Tensor weight, Tensor? target, Tensor? sample_ids, Tensor? key, int role, "
      "str distribution) -> (Tensor loss, Tensor grad)");
  m.def("gradient_gram(Tensor[] retain, Tensor[] forget, Tensor[] masks) -> Tensor?");
  m.def(
      "constraint_multiplier(Tensor gram, str barrier, float eta, Tensor? gap, float? max_norm) "
      "-> (Tensor multiplier, Tensor clip_scale, Tensor norm, Tensor finite)");
  m.def(
      "constrained_adamw_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] exp_avg_absmaxes, Tensor(e!)[] exp_avg_sq_absmaxes, Tensor[] retain, Tensor[] forget, "
      "Tensor(f!)[] ema, Tensor(g!)[] copies, Tensor[] masks, Tensor multiplier, Tensor clip_scale, Tensor finite, "
      "Tensor lr, Tensor(h!) step, float beta1, float beta2, float eps, float weight_decay, float ema_decay, "
      "Tensor? rounding_key) -> bool");
  m.def(
      "constrained_sgd_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor[] retain, Tensor[] forget, "
      "Tensor(c!)[] ema, Tensor(d!)[] copies, Tensor[] masks, Tensor multiplier, Tensor clip_scale, Tensor finite, "
      "Tensor lr, Tensor(e!) step, float momentum, bool nesterov, float weight_decay, float ema_decay, "
      "Tensor? rounding_key) -> bool");
  m.def("topk_encode(Tensor preactivations, int k) -> (Tensor values, Tensor indices)");
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor weight, Tensor? bias) -> Tensor");
  m.def("gather_dot(Tensor rows, Tensor indices, Tensor weight) -> Tensor");
  m.def("scatter_outer(Tensor values, Tensor rows, Tensor order, Tensor starts) -> Tensor");
}
