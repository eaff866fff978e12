"""The text of docs/performance.md, which benchmarks.report sets around its tables."""

HEAD = """\
# Performance

This page is made by `python -m benchmarks.report` from the newest file of each program and device in
[`benchmarks/results/`](../benchmarks/results). A file tells the hardware, the versions and the method, and has what is
left out here: medians with their extremes, relative errors, each implementation that was measured.

Machines of one kind differ by several percent, and so does one machine from day to day. So compare figures of one run,
or ratios to the dense matmuls that each run times beside its own.
"""

LAYER = """\
## Whole layers

From the router's logits to the layer's output, and back to the gradients of the input, both weights and the logits, in
TFLOP/s. *Of dense* is forward and backward as a share of the speed of one dense matmul (cuBLAS) that takes as many
operations as the layer's up-projection. *Error* is the largest of the relative errors against float32, of y and of
every gradient, as a multiple of what plain JAX in bfloat16 has. Configurations are those of
[`benchmarks/layers.py`](../benchmarks/layers.py). Routing *random* is that of independent normal logits; with *zipf*
the popularity of experts follows Zipf's law: the one of rank r gets a share in proportion to 1/r, but no token twice;
with *balanced* all get the same.
"""

BESIDE_LAYERS = """\
Beside others, forward / backward / both, random routing. Their figures were measured once, on other machines of the
kind; [`benchmarks/peers.py`](../benchmarks/peers.py) has the versions.
"""

EXPERTS = """\
## Time against the number of experts

The operations of *olmoe*, spread over ever more experts: T 32768, D 2048, F 1024, K 8, random routing. *Bound* is the
time at the speed that the fewest experts reach, or, if that is longer, the time in which the device copies as many
bytes as are moved at least for the weights: forward reads them once; backward reads them again and writes their
gradients. Times are in ms, speeds in TFLOP/s.
"""

GENERATION = """\
## Generation: few tokens

For few tokens a layer takes at least the time of reading its chosen experts' weights. Here several layers run one
after the other in one jit, given their routing: each token goes to K random experts. Each layer has weights of its own,
so that no cache holds any of them. *Experts* is how many different ones are chosen, *MB* what their weights have and
*us* the time, all for one layer. *Copy* is the rate at which the device copies 1 GiB, bytes read and written, in the
same rounds. The goal is 75 % of it, and 60 % for a single token.
"""

MEMORY = """\
## Memory of whole layers

In MiB. *Kept* lives from forward to backward, beside the layer's input, parameters and logits. *Peak* is what the
compiled forward and backward takes beside operands and results; with the results, which are y and the gradients of
input, weights and logits, it is in the next column.
"""

GROUPED_MATMUL = """\
## Grouped matmuls

`pallas_kernels` on the up-projections of four models, in TFLOP/s. *Of cuBLAS* is the ratio to the faster of dense and
batched matmuls of as many operations, through JAX or PyTorch; *of grouped_mm* that to PyTorch's grouped_mm. All of it
is from the same run; an empty cell was not measured in it.
"""

BLOCK_SPARSE = """\
## Block-sparse products

The products of an expert MLP as block-sparse matrices, and their gradients, on the shapes of MegaBlocks
([arXiv 2211.15841](https://arxiv.org/abs/2211.15841), section 6.3): M rows in equal groups on E experts, whole blocks
of 128, with matrices [K, N]. In TFLOP/s, beside a batched matmul of as many operations on cuBLAS. The goal is 0.95 of
it.
"""

TRAIN_STEP = """\
## Training steps

OLMoE cut to some of its 16 layers: forward, backward and AdamW on random tokens. *bf16* has parameters and moments in
bfloat16 and clips nothing; *program* is what the training program does by default, with float32 master weights and
moments, and clipping.
"""

BESIDE_STEPS = """\
The same model with 4 layers, batch 4 x 4096, bfloat16, in Hugging Face transformers 5.17 on PyTorch's grouped_mm,
measured once on another machine of the kind:
"""

ROUTING = """\
## Dropless, capacities, token rounding

One model, trained from the same parameters on the same text by several ways of routing. *Dropped* is the share of the
assignments that a capacity drops in training; *padded* is that of rows which only fill blocks of so many rows, and
*experts* the assignments of a token that are computed, both on held-out text. *Loss* is in nats per target of that
text, routed as in training, and *by top-k* with the same parameters in a dropless model: the mean over the seeds, and
its extremes. Settings without a row have not been measured yet.
"""

SCALING = """\
## Several GPUs of one host

Layers whose experts are split over all devices, with T tokens on each: TFLOP/s of each device, and *of one device*: the
speed of each over that of one device with all experts and T tokens, timed in the same rounds. *Placement* says which
device has which experts. *Fullest* is the load of the fullest device over the mean, and nothing is faster than its
inverse. *Of ragged* is the speed over that of the same layer on `jax.lax.ragged_all_to_all`. Training steps have the
same batch on each device, and *of one device* is their weak scaling. The deepest model is OLMoE with as many layers as
can be trained. [Scaling](scaling.md) says how to choose a mesh and an exchange.
"""

SIMULATION = """\
## Predictions for many GPUs

What [the time model](scaling.md#predicting-a-step) makes of the results above; nothing here was measured, but for the
sources that are named. For each number of GPUs the fastest mesh that fits into memory, with the parts of a step in ms.
*Of one GPU* is the speed of each GPU over that of one alone, whether the model fits there or not.
"""

REPRODUCE = """\
## How to reproduce

```bash
python -m benchmarks.grouped_matmul
python -m benchmarks.layer --routing random,zipf
python -m benchmarks.layer --routing random,zipf --resume --peers
python -m benchmarks.layer --only 'E*' --resume
python -m benchmarks.generation
python -m benchmarks.memory
python -m benchmarks.train_step
python -m benchmarks.train_step --no-scan-layers --resume
python -m benchmarks.block_sparse
python -m benchmarks.routing --steps 300 --batch-size 8 --sequence-length 64 --block-rows 32 --num-seeds 3 \\
  --validation-batches 64
python -m benchmarks.scaling
python -m benchmarks.scaling --simulate
python -m benchmarks.report
```

Each program has `--help`, writes a result as soon as it has it, and goes on with a file by `--resume`. `--peers`
measures other implementations too, those that can be imported, each in a process of its own: `jax.lax.ragged_dot` and
`tokamax` on JAX; grouped_mm, ScatterMoE (`fms-acceleration-moe`) and SonicMoE (`sonic-moe`) on PyTorch. Matmuls and
layers are timed only after their results were compared with float32.
"""
