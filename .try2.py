import sys, json, shutil, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, AutoModelForCausalLM
import pocketlm
from pocketlm import api
base=Path("/tmp/wt/scratch-structured"); shutil.rmtree(base, ignore_errors=True); base.mkdir()
src="/tmp/bench/original-3"
kw=dict(samples=4, seq_len=64)
print(api.plan(src, {"steps":[{"method":"depth","ratio":0.34}]}, **kw))
r=api.compress(src, {"steps":[{"method":"depth","ratio":0.34}]}, base/"a", **kw)
print(r)
m=AutoModelForCausalLM.from_pretrained(base/"a"); print(m.config.num_hidden_layers, sum(p.numel() for p in m.parameters()))
for c in api.verify(base/"a", src).checks: print(c)
r=api.compress(src, {"steps":[{"method":"depth","ratio":0.34}, "rtn"], "ignore":["lm_head"]}, base/"b", **kw)
print(r.warnings, r.bits_per_weight, r.already_done)
r=api.compress(src, {"steps":[{"method":"depth","ratio":0.34}, "rtn"], "ignore":["lm_head"]}, base/"b", **kw)
print(r.already_done)
for c in api.verify(base/"b", src).checks: print(c)
print([str(p.relative_to(base)) for p in base.rglob("*")])
