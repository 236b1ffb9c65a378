// SPDX-License-Identifier: Apache-2.0
// The C++ kernels as PyTorch operations `fastprompt_cpp::*`, on the stable ABI: pointers and strides in, nothing else.
//
// Shapes, dtypes, devices and indices are checked and outputs allocated by fastprompt/ops; these operations are its
// private way down. `isa` is a level of isa.h. What indexes memory is checked here, too: while torch.compile traces,
// there are no values to look at.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "compress_kv.h"
#include "decode.h"
#include "decoupled_attention.h"
#include "diffuse_prompts.h"
#include "key_scores.h"
#include "prompt_attention.h"

namespace {

using fastprompt::DecoupledAttention;
using fastprompt::DiffusePrompts;
using fastprompt::DiffusePromptsGrads;
using fastprompt::DType;
using fastprompt::Isa;
using fastprompt::KeyBranch;
using fastprompt::Mask;
using fastprompt::PromptAttention;
using fastprompt::PromptAttentionGrads;
using fastprompt::Rows;
using fastprompt::Threads;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

DType dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Bool: return DType::boolean;
    default: STD_TORCH_CHECK(false, "fastprompt_cpp: unexpected dtype");
  }
}

// The level to run at; one that this processor lacks is an error and never a fault.
Isa level(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= static_cast<int64_t>(fastprompt::best_isa()),
                  "fastprompt_cpp: this processor has no level ", isa);
  return static_cast<Isa>(isa);
}

Threads threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int count, void (*body)(void*), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context);
            });
          }};
}

// [sample, head, row, dim], or packed [row, head, dim].
Rows rows(const Tensor& x, bool packed = false) {
  if (packed) return {x.data_ptr(), dtype_of(x), 0, x.stride(1), x.stride(0)};
  return {x.data_ptr(), dtype_of(x), x.stride(0), x.stride(1), x.stride(2)};
}

Rows rows(const MaybeTensor& x, bool packed = false) { return x ? rows(*x, packed) : Rows(); }

Mask mask_of(const MaybeTensor& x) {
  if (!x) return {};
  return {x->data_ptr(), dtype_of(*x), x->stride(0), x->stride(1), x->stride(2), x->stride(3)};
}

// Prompts that a sample may read, and sequences that cover the `rows` there are.
void check_indices(const PromptAttention& p, int64_t rows) {
  for (int64_t s = 0; s < p.samples; ++s) {
    STD_TORCH_CHECK(p.prompt_of(s) >= 0 && p.prompt_of(s) < p.bank, "prompt_index: got ", p.prompt_of(s), " at [", s,
                    "], expected [0, ", p.bank - 1, "] (bank of ", p.bank, ")");
  }
  if (!p.cu_seqlens) return;
  STD_TORCH_CHECK(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.samples] == rows, "cu_seqlens: got ", p.cu_seqlens[0],
                  " first and ", p.cu_seqlens[p.samples], " last, expected 0 and ", rows, " (the rows of query)");
  for (int64_t s = 0; s < p.samples; ++s) {
    STD_TORCH_CHECK(p.queries_of(s) > 0 && p.queries_of(s) <= p.tq, "cu_seqlens: got a sequence of ", p.queries_of(s),
                    " rows at [", s, "], expected 1 to ", p.tq, " (max_seqlen)");
  }
}

PromptAttention problem(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prompt_key,
                        const Tensor& prompt_value, const MaybeTensor& prompt_index, const MaybeTensor& attn_mask,
                        const MaybeTensor& cu_seqlens, int64_t max_seqlen, bool is_causal, double scale) {
  const bool packed = cu_seqlens.has_value();
  PromptAttention p;
  p.samples = packed ? cu_seqlens->size(0) - 1 : query.size(0);
  p.heads = query.size(1), p.heads_kv = key.size(1), p.dim = query.size(packed ? 2 : 3);
  p.tq = packed ? max_seqlen : query.size(2), p.tk = packed ? max_seqlen : key.size(2);
  p.bank = prompt_key.size(0), p.prompts = prompt_key.size(2);
  p.prompt_index = prompt_index ? prompt_index->const_data_ptr<int64_t>() : nullptr;
  p.cu_seqlens = packed ? cu_seqlens->const_data_ptr<int32_t>() : nullptr;
  p.query = rows(query, packed), p.key = rows(key, packed), p.value = rows(value, packed);
  p.prompt_key = rows(prompt_key), p.prompt_value = rows(prompt_value);
  p.mask = mask_of(attn_mask);
  p.causal = is_causal, p.scale = static_cast<float>(scale);
  check_indices(p, query.size(0));
  return p;
}

void prompt_attention(const Tensor query, const Tensor key, const Tensor value, const Tensor prompt_key,
                      const Tensor prompt_value, MaybeTensor prompt_index, MaybeTensor attn_mask,
                      MaybeTensor cu_seqlens, int64_t max_seqlen, bool is_causal, double scale, int64_t isa, Tensor out,
                      Tensor lse) {
  const bool packed = cu_seqlens.has_value();
  const auto p = problem(query, key, value, prompt_key, prompt_value, prompt_index, attn_mask, cu_seqlens, max_seqlen,
                         is_causal, scale);
  fastprompt::prompt_attention_forward(p, rows(out, packed), rows(lse, packed), level(isa), threads());
}

void prompt_attention_backward(const Tensor grad_out, MaybeTensor grad_lse, const Tensor query, const Tensor key,
                               const Tensor value, const Tensor prompt_key, const Tensor prompt_value,
                               MaybeTensor prompt_index, MaybeTensor attn_mask, MaybeTensor cu_seqlens,
                               int64_t max_seqlen, const Tensor out, const Tensor lse, bool is_causal, double scale,
                               int64_t isa, MaybeTensor query_grad, MaybeTensor key_grad, MaybeTensor value_grad,
                               MaybeTensor prompt_key_grad, MaybeTensor prompt_value_grad) {
  const bool packed = cu_seqlens.has_value();
  const auto p = problem(query, key, value, prompt_key, prompt_value, prompt_index, attn_mask, cu_seqlens, max_seqlen,
                         is_causal, scale);
  PromptAttentionGrads grads;
  grads.grad_out = rows(grad_out, packed), grads.grad_lse = rows(grad_lse, packed);
  grads.out = rows(out, packed), grads.lse = rows(lse, packed);
  grads.query = rows(query_grad, packed), grads.key = rows(key_grad, packed), grads.value = rows(value_grad, packed);
  grads.prompt_key = rows(prompt_key_grad), grads.prompt_value = rows(prompt_value_grad);
  fastprompt::prompt_attention_backward(p, grads, level(isa), threads());
}

// Sets of keys [sample or 1, head, key, dim] with a weight of every row [sample, head, row] or one of all.
std::vector<KeyBranch> branches_of(const Tensor& query, const Tensors& keys, const Tensors& values,
                                   const MaybeTensors& weights, const std::vector<double>& factors) {
  std::vector<KeyBranch> branches(keys.size());
  for (size_t j = 0; j < keys.size(); ++j) {
    KeyBranch& branch = branches[j];
    branch.keys = keys[j].size(2), branch.shared = keys[j].size(0) != query.size(0);
    branch.key = rows(keys[j]), branch.value = rows(values[j]);
    branch.weight = rows(weights[j]), branch.factor = static_cast<float>(factors[j]);
  }
  return branches;
}

DecoupledAttention decoupled(const Tensor& query, const Tensors& keys, double scale,
                             const std::vector<KeyBranch>& branches) {
  DecoupledAttention p;
  p.rows.samples = query.size(0), p.rows.heads = query.size(1), p.rows.heads_kv = keys[0].size(1);
  p.rows.tq = query.size(2), p.rows.dim = query.size(3), p.rows.scale = static_cast<float>(scale);
  p.rows.query = rows(query);
  p.branches = branches.data(), p.count = static_cast<int64_t>(branches.size());
  return p;
}

void decoupled_attention(const Tensor query, Tensors keys, Tensors values, MaybeTensors weights,
                         std::vector<double> factors, double scale, int64_t isa, Tensor out) {
  const auto branches = branches_of(query, keys, values, weights, factors);
  fastprompt::decoupled_attention_forward(decoupled(query, keys, scale, branches), rows(out), level(isa), threads());
}

void decoupled_attention_backward(const Tensor grad_out, const Tensor query, Tensors keys, Tensors values,
                                  MaybeTensors weights, std::vector<double> factors, double scale, int64_t isa,
                                  MaybeTensor query_grad, MaybeTensors key_grads, MaybeTensors value_grads,
                                  MaybeTensors weight_grads) {
  auto branches = branches_of(query, keys, values, weights, factors);
  for (size_t j = 0; j < branches.size(); ++j) {
    branches[j].key_grad = rows(key_grads[j]), branches[j].value_grad = rows(value_grads[j]);
    branches[j].weight_grad = rows(weight_grads[j]);
  }
  fastprompt::decoupled_attention_backward(decoupled(query, keys, scale, branches), rows(grad_out), rows(query_grad),
                                           level(isa), threads());
}

void compress_kv(const Tensor key, const Tensor value, const Tensor index, MaybeTensor valid, int64_t merge,
                 bool merge_keys, int64_t isa, Tensor kept_key, Tensor kept_value) {
  fastprompt::CompressKv p;
  p.samples = key.size(0), p.heads = key.size(1), p.length = key.size(2), p.slots = index.size(2);
  p.dim = key.size(3), p.dim_value = value.size(3);
  p.key = rows(key), p.value = rows(value);
  p.index = index.const_data_ptr<int64_t>();
  p.valid = valid ? static_cast<const unsigned char*>(valid->data_ptr()) : nullptr;
  p.merge = static_cast<fastprompt::Merge>(merge), p.merge_keys = merge_keys;
  fastprompt::compress_kv(p, rows(kept_key), rows(kept_value), level(isa), threads());
}

// [sample, token, width], or [prompt, width].
Rows token_rows(const Tensor& x) { return {x.data_ptr(), dtype_of(x), x.stride(0), 0, x.stride(1)}; }
Rows token_rows(const MaybeTensor& x) { return x ? token_rows(*x) : Rows(); }
Rows table(const Tensor& x) { return {x.data_ptr(), dtype_of(x), 0, 0, x.stride(0)}; }
Rows table(const MaybeTensor& x) { return x ? table(*x) : Rows(); }

DiffusePrompts diffusion(const Tensor& x, const MaybeTensor& base, const Tensor& prompts, const Tensor& keys,
                         double factor, bool softmax, bool rowmax) {
  DiffusePrompts p;
  p.samples = x.size(0), p.tokens = x.size(1), p.width = x.size(2), p.prompts = prompts.size(0);
  p.x = token_rows(x), p.base = token_rows(base), p.values = table(prompts), p.keys = table(keys);
  p.factor = static_cast<float>(factor), p.softmax = softmax, p.rowmax = rowmax;
  return p;
}

void diffuse_prompts(const Tensor x, const Tensor base, const Tensor prompts, const Tensor keys, double factor,
                     bool softmax, bool rowmax, int64_t isa, Tensor out) {
  const auto p = diffusion(x, base, prompts, keys, factor, softmax, rowmax);
  fastprompt::diffuse_prompts_forward(p, token_rows(out), level(isa), threads());
}

void diffuse_prompts_backward(const Tensor grad_out, const Tensor x, MaybeTensor base, const Tensor prompts,
                              const Tensor keys, double factor, bool softmax, bool rowmax, int64_t isa,
                              MaybeTensor x_grad, MaybeTensor base_grad, MaybeTensor prompts_grad,
                              MaybeTensor keys_grad, MaybeTensor log_scale_grad) {
  const auto p = diffusion(x, base, prompts, keys, factor, softmax, rowmax);
  DiffusePromptsGrads grads;
  grads.grad_out = token_rows(grad_out), grads.x = token_rows(x_grad), grads.base = token_rows(base_grad);
  grads.values = table(prompts_grad), grads.keys = table(keys_grad);
  grads.log_scale = log_scale_grad ? log_scale_grad->mutable_data_ptr<float>() : nullptr;
  fastprompt::diffuse_prompts_backward(p, grads, level(isa), threads());
}

// One new token for every sample: query [B,Hq,T,D] over blocks of keys [N,D], of head h of sample s those from row
// ends[i] to ends[i + 1], i = s * Hkv + h, and over key [B,Hkv,Tk,D].
void decode_blocks(const Tensor query, const Tensor key, const Tensor value, const Tensor block_key,
                   const Tensor block_value, const Tensor ends, double scale, int64_t isa, Tensor out, Tensor lse) {
  PromptAttention p;
  p.samples = query.size(0), p.heads = query.size(1), p.heads_kv = key.size(1), p.dim = query.size(3);
  p.tq = query.size(2), p.tk = key.size(2);
  p.query = rows(query), p.key = rows(key), p.value = rows(value);
  p.prompt_key = table(block_key), p.prompt_value = table(block_value);
  p.scale = static_cast<float>(scale);
  fastprompt::decode(p, ends.const_data_ptr<int64_t>(), rows(out), rows(lse), level(isa), threads());
}

void key_scores(const Tensor query, const Tensor key, const Tensor lse, MaybeTensor query_mask, MaybeTensor key_mask,
                bool is_causal, int64_t query_start, double scale, bool visible, int64_t group_reduce, int64_t isa,
                Tensor scores) {
  fastprompt::KeyScores p;
  p.samples = query.size(0), p.heads = query.size(1), p.heads_kv = key.size(1), p.dim = query.size(3);
  p.tq = query.size(2), p.tk = key.size(2);
  p.query = rows(query), p.key = rows(key), p.lse = rows(lse);
  p.query_mask = token_rows(query_mask), p.key_mask = token_rows(key_mask);
  p.query_start = query_start, p.causal = is_causal, p.visible = visible;
  p.reduce = static_cast<fastprompt::GroupReduce>(group_reduce), p.scale = static_cast<float>(scale);
  fastprompt::key_scores(p, rows(scores), level(isa), threads());
}

}  // namespace

// Torch's macros count with __COUNTER__, of which Clang 22 warns.
#ifdef __clang__
#if __has_warning("-Wc2y-extensions")
#pragma clang diagnostic ignored "-Wc2y-extensions"
#endif
#endif

STABLE_TORCH_LIBRARY(fastprompt_cpp, m) {
  m.def(
      "prompt_attention(Tensor query, Tensor key, Tensor value, Tensor prompt_key, Tensor prompt_value, "
      "Tensor? prompt_index, Tensor? attn_mask, Tensor? cu_seqlens, int max_seqlen, bool is_causal, float scale, "
      "int isa, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "prompt_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor prompt_key, Tensor prompt_value, Tensor? prompt_index, Tensor? attn_mask, Tensor? cu_seqlens, "
      "int max_seqlen, Tensor out, Tensor lse, bool is_causal, float scale, int isa, Tensor(a!)? query_grad, "
      "Tensor(b!)? key_grad, Tensor(c!)? value_grad, Tensor(d!)? prompt_key_grad, Tensor(e!)? prompt_value_grad) "
      "-> ()");
  m.def(
      "compress_kv(Tensor key, Tensor value, Tensor index, Tensor? valid, int merge, bool merge_keys, int isa, "
      "Tensor(a!) kept_key, Tensor(b!) kept_value) -> ()");
  m.def(
      "decoupled_attention(Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] weights, float[] factors, "
      "float scale, int isa, Tensor(a!) out) -> ()");
  m.def(
      "decoupled_attention_backward(Tensor grad_out, Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] weights, "
      "float[] factors, float scale, int isa, Tensor(a!)? query_grad, Tensor(b!)?[] key_grads, "
      "Tensor(c!)?[] value_grads, Tensor(d!)?[] weight_grads) -> ()");
  m.def(
      "decode_blocks(Tensor query, Tensor key, Tensor value, Tensor block_key, Tensor block_value, Tensor ends, "
      "float scale, int isa, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "key_scores(Tensor query, Tensor key, Tensor lse, Tensor? query_mask, Tensor? key_mask, bool is_causal, "
      "int query_start, float scale, bool visible, int group_reduce, int isa, Tensor(a!) scores) -> ()");
  m.def(
      "diffuse_prompts(Tensor x, Tensor base, Tensor prompts, Tensor keys, float factor, bool softmax, bool rowmax, "
      "int isa, Tensor(a!) out) -> ()");
  m.def(
      "diffuse_prompts_backward(Tensor grad_out, Tensor x, Tensor? base, Tensor prompts, Tensor keys, float factor, "
      "bool softmax, bool rowmax, int isa, Tensor(a!)? x_grad, Tensor(b!)? base_grad, Tensor(c!)? prompts_grad, "
      "Tensor(d!)? keys_grad, Tensor(e!)? log_scale_grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt_cpp, CPU, m) {
  m.impl("prompt_attention", TORCH_BOX(&prompt_attention));
  m.impl("prompt_attention_backward", TORCH_BOX(&prompt_attention_backward));
  m.impl("compress_kv", TORCH_BOX(&compress_kv));
  m.impl("decoupled_attention", TORCH_BOX(&decoupled_attention));
  m.impl("decoupled_attention_backward", TORCH_BOX(&decoupled_attention_backward));
  m.impl("decode_blocks", TORCH_BOX(&decode_blocks));
  m.impl("key_scores", TORCH_BOX(&key_scores));
  m.impl("diffuse_prompts", TORCH_BOX(&diffuse_prompts));
  m.impl("diffuse_prompts_backward", TORCH_BOX(&diffuse_prompts_backward));
}

#ifdef __clang__
#define FASTPROMPT_COMPILER __VERSION__
#else
#define FASTPROMPT_COMPILER "GCC " __VERSION__
#endif

// `import fastprompt._C` loads the library, which registers the operations; the module itself tells what was built.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C",
                                   "The C++ kernels: importing it registers the operations fastprompt_cpp::*.", -1,
                                   nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  if (PyModule_AddStringConstant(module, "compiler", FASTPROMPT_COMPILER) ||
      PyModule_AddStringConstant(module, "isa", fastprompt::isa_name(fastprompt::best_isa()))) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
