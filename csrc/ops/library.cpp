// SPDX-License-Identifier: BSD-3-Clause
// The schemas of all operators, and the Python module: build facts and the choice of a backend.
#include <ATen/core/enum_tag.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <regex>
#include <string>

#include "cpu/backend.h"
#include "ops/backends.h"

namespace flash::ops {

namespace {

const std::string kOptions =
    "Tensor? bias=None, Tensor? mask=None, "
    "Tensor? alibi_slopes=None, Tensor? sink=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "Tensor? rng_state=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, "
    "bool bottom_right=False, SymInt? window_left=None, SymInt? window_right=None, "
    "SymInt prefix=0, float scale=1.0, float softcap=0.0, float dropout_p=0.0";
const std::string kInputs = "Tensor q, Tensor k, Tensor v, " + kOptions;
const std::string kJointInputs = "Tensor? q, Tensor joint, " + kOptions;
const std::string kWeightsInputs =
    "Tensor q, Tensor k, Tensor lse, Tensor? bias=None, Tensor? mask=None, "
    "Tensor? alibi_slopes=None, Tensor? rng_state=None, bool bottom_right=False, "
    "SymInt? window_left=None, SymInt? window_right=None, SymInt prefix=0, float scale=1.0, "
    "float softcap=0.0, float dropout_p=0.0, bool average=True";

/// The same arguments, all of them required.
std::string required(const std::string& arguments) {
  return std::regex_replace(arguments, std::regex("=[^,]*"), "");
}

}  // namespace

TORCH_LIBRARY(flash_attn, m) {
  // Any strides are welcome, so Inductor need not copy.
  const std::vector<at::Tag> pure{at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};
  const std::vector<at::Tag> random{at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  const auto def = [&](const std::string& schema, const std::vector<at::Tag>& tags) {
    m.def(schema.c_str(), tags);
  };
  def("sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
      "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor",
      pure);
  def("_as_4d(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
      "bool enable_gqa) -> (Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask)",
      pure);
  def("attention(" + kInputs + ", bool deterministic=False) -> (Tensor out, Tensor lse)", pure);
  def("attention_joint(" + kJointInputs + ", bool deterministic=False) -> (Tensor out, Tensor lse)",
      pure);
  def("_fwd(" + kInputs + ") -> (Tensor out, Tensor lse)", pure);
  def("_bwd(Tensor? dout, Tensor? dlse, " + required(kInputs) +
          ", Tensor out, Tensor lse, bool deterministic, bool[6] needs) -> (Tensor dq, Tensor dk, "
          "Tensor dv, Tensor dbias, Tensor dslopes, Tensor dsink)",
      pure);
  def("_bwd_joint(Tensor? dout, Tensor? dlse, " + required(kJointInputs) +
          ", Tensor out, Tensor lse, bool deterministic, bool[6] needs) -> (Tensor dq, "
          "Tensor djoint, Tensor dbias, Tensor dslopes, Tensor dsink)",
      pure);
  def("rng_state(Tensor like, SymInt increment) -> Tensor", random);
  def("attention_weights(" + kWeightsInputs + ") -> Tensor", pure);
  def("_attention_weights_bwd(Tensor dweights, " + required(kWeightsInputs) +
          ") -> (Tensor dq, Tensor dk, Tensor dlse, Tensor dbias)",
      pure);
  def("_why_unsupported(" + kInputs + ", str backend=\"\", bool backward=False) -> str[]", pure);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Operators of flash_attn; importing it registers torch.ops.flash_attn.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["cxx_standard"] = int64_t(__cplusplus);
    info["backends"] = backend_names();
    return info;
  });
  m.def("backends", &backend_names, "Backends of this build.");
  m.def("set_backend", &set_named_backend, pybind11::arg("name"),
        "The backend that calls must take, process-wide; '' chooses the first that can.");
  m.def("get_backend", &named_backend);
  m.def("available_isas", &cpu::available_isas, "CPU instruction sets, best last.");
  m.def("set_cpu_isa", &cpu::set_isa, pybind11::arg("name"), "'' returns to the best.");
  m.def("cpu_isa", [] { return std::string(cpu::current_isa()); });
}

}  // namespace flash::ops
