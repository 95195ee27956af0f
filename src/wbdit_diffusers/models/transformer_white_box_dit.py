"""White-Box Diffusion Transformer (arXiv 2411.06785) and, as its baseline, the plain DiT block (arXiv 2212.09748).

A cell's latents are cut into patches of consecutive values, and each patch is a token. Each block takes two steps on
one objective, the sparse rate reduction of CRATE (arXiv 2306.01129): attention compresses the tokens in learned
subspaces `U`, then ISTA makes them sparse in a learned dictionary `D`. `WhiteBoxDiTBlock` is the published block: its
trained steps may leave the objective. The steps of `DescentBlock` can only lower it.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from .loading import SafetensorsModel


class AttentionProcessor:
    """The attention of a block, which [`AttentionMixin.set_attn_processor`] can replace."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "Attention", hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = attn.project(hidden_states)  # (batch, tokens, heads, head_dim) each
        backend = self._attention_backend
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and backend is None:
            # In bfloat16 on a CPU, fused attention is slower than its products written out, above all backwards.
            q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (batch, heads, tokens, tokens)
            attended = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
        else:
            parallel_config = self._parallel_config
            attended = dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config)
        return attn.lift(attended, query)


class Attention(nn.Module, AttentionModuleMixin):
    """An attention layer, which makes queries, keys and values of tokens, and tokens of what they attend to."""

    _default_processor_cls = AttentionProcessor
    _supports_qkv_fusion = False

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads
        self.set_processor(AttentionProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)  # (batch, tokens, hidden)

    def lift(self, attended: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return self.to_out(attended.flatten(2))


class MSSA(Attention):
    """Multi-head subspace self-attention (CRATE, arXiv 2306.01129, section 2.3; arXiv 2411.06785, "MSSA").

    One projection `w = U x` is query, key and value at once: `softmax(w wᵀ / sqrt(head_dim)) w` per head. The rows of
    `to_w.weight` are the bases `U_h` of `heads` subspaces. In theory, a step of MSSA descends the coding rate of the
    tokens in those subspaces. The theory ties `to_out` to `U`; here, as in the authors' code, it is free.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(heads)
        self.to_w = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        w = self.to_w(hidden_states).unflatten(-1, (self.heads, -1))  # (batch, tokens, heads, head_dim)
        return w, w, w


class SelfAttention(Attention):
    """The DiT block's attention, with separate query, key and value from one matrix product."""

    def __init__(self, dim: int, heads: int):
        super().__init__(heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1)).unbind(2)


class ISTA(nn.Module):
    """One step of the iterative shrinkage-thresholding algorithm for a non-negative LASSO in the dictionary `D`.

    `relu(x + η(Dᵀx - DᵀDx) - ηλ)` (CRATE, arXiv 2306.01129, section 2.4), computed with `Dᵀ(x - Dx)`: two matrix
    products instead of three.
    """

    def __init__(self, dim: int, step_size: float, lambd: float):
        super().__init__()
        self.step_size = step_size
        self.lambd = lambd
        self.dictionary = nn.Parameter(torch.empty(dim, dim))  # D
        nn.init.kaiming_uniform_(self.dictionary)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states - F.linear(hidden_states, self.dictionary)  # x - Dx
        gradient = F.linear(residual, self.dictionary.t())  # Dᵀ(x - Dx)
        return F.relu(hidden_states + self.step_size * gradient - self.step_size * self.lambd)


def orthogonal_(parameter: nn.Parameter):
    """`nn.init.orthogonal_` for any dtype: its QR decomposition does not exist in half precision."""
    with torch.no_grad():
        parameter.copy_(nn.init.orthogonal_(torch.empty_like(parameter, dtype=torch.float32)))


def largest_eigenvalue(matrix: torch.Tensor) -> torch.Tensor:
    """An upper bound of the largest eigenvalue of `AᵀA`: the 16-norm of all eigenvalues, which needs no iteration."""
    gram = matrix.t().float() @ matrix.float()
    scale = gram.norm()  # at least the largest eigenvalue, so that powers stay finite
    power = gram / scale
    for _ in range(3):
        power = power @ power
    return scale * power.norm() ** (1 / 8)


class Contraction(Attention):
    """The step of MSSA as the theory derives it: `Uᵀ(softmax(w wᵀ / sqrt(p)) w - w) / ‖U‖²` with `w = U x`.

    Gradient descent of the coding rate (CRATE, arXiv 2306.01129, equation 11) removes what a token has alone in a
    subspace. [`MSSA`] drops the `- w` and replaces `Uᵀ` by a learned matrix; its trained steps raise the coding rate
    (docs/white_box.md). The division by ‖U‖² keeps a step from overshooting, like ‖D‖² in ISTA.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(heads)
        self.subspaces = nn.Parameter(torch.empty(dim, dim))  # U, the bases of all heads in rows
        orthogonal_(self.subspaces)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        w = F.linear(hidden_states, self.subspaces).unflatten(-1, (self.heads, -1))  # (batch, tokens, heads, head_dim)
        return w, w, w

    def lift(self, attended: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        bases = self.subspaces.t() / largest_eigenvalue(self.subspaces).to(query.dtype)
        return F.linear((attended - query).flatten(2), bases)


class BoundedISTA(nn.Module):
    """One step of ISTA that always descends: `relu(a + η Dᵀ(x - Da) - ηλ)`, starting at the code `a = relu(x)`.

    With `η ≤ 1 / ‖D‖²` the step lowers `½‖x - Da‖² + λ‖a‖₁` (Beck and Teboulle 2009, lemma 2.3); λ is learned.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dictionary = nn.Parameter(torch.empty(dim, dim))  # D
        orthogonal_(self.dictionary)
        self.log_lambda = nn.Parameter(torch.tensor(math.log(0.1)))

    @property
    def lambd(self) -> torch.Tensor:
        """λ > 0, the weight of sparsity."""
        return self.log_lambda.exp()

    @property
    def step_size(self) -> torch.Tensor:
        """η, at most 1 / ‖D‖²."""
        return 1 / largest_eigenvalue(self.dictionary)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        step_size = (1 / largest_eigenvalue(self.dictionary)).to(hidden_states.dtype)  # η
        code = F.relu(hidden_states)  # a
        residual = hidden_states - F.linear(code, self.dictionary)  # x - Da
        # The step size scales the dictionary, and -ηλ is the bias: fewer passes over the tokens.
        bias = (-step_size * self.log_lambda.exp()).to(hidden_states.dtype).expand(len(self.dictionary))
        return F.relu(code + F.linear(residual, step_size * self.dictionary.t(), bias))  # a + η Dᵀ(x - Da) - ηλ


def per_cell(modulation: torch.Tensor, label_index: torch.Tensor | None) -> torch.Tensor:
    """The modulation of each cell, `(batch or 1, 1, features)`, from those of its label combinations."""
    return (modulation if label_index is None else modulation[label_index])[:, None]


class AdaLNZeroBlock(nn.Module):
    """`x + gate₁·attn(mod(LN x))`, then `x + gate₂·ff(mod(LN x))`, every shift, scale and gate from `temb`.

    CRATE has no residual around the second half. With it, only the branch is sparse, not the token stream.
    """

    def __init__(self, dim: int, attn: nn.Module, ff: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attn = attn
        self.ff = ff

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, label_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        modulation = per_cell(self.modulation(temb), label_index)  # (batch or 1, 1, 6 * hidden)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)

        attn_output = self.attn(self.norm(hidden_states) * (1 + scale_attn) + shift_attn)
        hidden_states = hidden_states + gate_attn * attn_output

        ff_output = self.ff(self.norm(hidden_states) * (1 + scale_ff) + shift_ff)
        return hidden_states + gate_ff * ff_output  # (batch, tokens, hidden)


class WhiteBoxDiTBlock(AdaLNZeroBlock):
    """MSSA compresses, ISTA sparsifies (arXiv 2411.06785)."""

    def __init__(self, dim: int, heads: int, ista_step_size: float, ista_lambda: float):
        super().__init__(dim, attn=MSSA(dim, heads), ff=ISTA(dim, ista_step_size, ista_lambda))


class DescentBlock(nn.Module):
    """Two steps of the sparse rate reduction: contraction in the subspaces, then sparse coding in the dictionary.

    Timestep and labels add one vector to all tokens and set the length of each step, from 0 (none) to 1 (full). Gates
    per channel, or negative gates, could turn a step uphill. The tokens take the steps themselves, without a parallel
    branch. ISTA's step descends by theorem; the step of attention was measured to descend (docs/white_box.md).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, dim + 2)
        self.attn = Contraction(dim, heads)
        self.ff = BoundedISTA(dim)

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, label_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        modulation = per_cell(self.modulation(temb), label_index)  # (batch or 1, 1, hidden + 2)
        shift, gates = modulation.split([hidden_states.shape[-1], 2], dim=-1)
        hidden_states = self.norm(hidden_states + shift)
        dtype = hidden_states.dtype  # autocast gives other modules half precision
        gate_attn, gate_ff = torch.sigmoid(gates - 1).to(dtype).chunk(2, dim=-1)  # (batch or 1, 1, 1) each

        hidden_states = torch.addcmul(hidden_states, gate_attn, self.attn(hidden_states).to(dtype))
        return torch.lerp(hidden_states, self.ff(hidden_states).to(dtype), gate_ff)  # (batch, tokens, hidden)


class DiTBlock(AdaLNZeroBlock):
    """Self-attention and an MLP with a fourfold hidden size (arXiv 2212.09748): the baseline in comparisons."""

    def __init__(self, dim: int, heads: int):
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU("tanh"), "fc2": nn.Linear(4 * dim, dim)}
        super().__init__(dim, attn=SelfAttention(dim, heads), ff=nn.Sequential(OrderedDict(layers)))


class TokenLinear(nn.Module):
    """A separate linear map for each token: `(batch, tokens, in_features)` to `(batch, tokens, out_features)`."""

    def __init__(self, num_tokens: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(num_tokens, out_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bni,nio->bno", hidden_states, self.weight) + self.bias


class WhiteBoxDiTModel(SafetensorsModel, AttentionMixin, ConfigMixin):
    r"""
    Predicts the noise in a batch of noisy latents, or their velocity, depending on the scheduler's `prediction_type`.

    The defaults are those of `wbdit train`. `--config paper` builds the network of arXiv 2411.06785, which has
    17,926,666 parameters (33,870,346 with `block_type="dit"`):

    ```py
    shape = {"patch_size": 10, "num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 96}
    WhiteBoxDiTModel(sample_size=2000, block_type="white_box", **shape)
    ```

    Args:
        sample_size (`int`, defaults to 17):
            Number of values per cell, the codec's `num_features`: programs and library size of a [`ProgramCodec`],
            genes (and library size) of an [`ExpressionCodec`]. It need not be a multiple of `patch_size`.
        patch_size (`int`, defaults to 2): Number of consecutive values per token.
        num_layers (`int`, defaults to 4): Number of blocks.
        num_attention_heads (`int`, defaults to 4): Number of heads, each of which is a subspace.
        attention_head_dim (`int`, defaults to 16):
            Dimension of a subspace. The hidden size, `num_attention_heads` times this, must be a multiple of 4.
        ista_step_size (`float`, defaults to 0.1): Step size η of the ISTA step of the `"white_box"` block.
        ista_lambda (`float`, defaults to 0.1): Weight λ of sparsity in the `"white_box"` block.
        block_type (`str`, defaults to `"descent"`):
            `"descent"` ([`DescentBlock`], with separate projections for each token), `"white_box"`
            ([`WhiteBoxDiTBlock`], as published) or `"dit"` ([`DiTBlock`], self-attention and MLP).
        condition_sizes (`tuple[int]`, defaults to `()`):
            Number of categories of each label key. Empty for an unconditional model.
        condition_dropout (`float`, defaults to 0.1):
            Probability that a training cell gets the null label in every label key, for classifier-free guidance. If
            there are several keys, it is also the probability of the null label in one of them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["WhiteBoxDiTBlock", "DescentBlock", "DiTBlock"]
    _repeated_blocks = ["WhiteBoxDiTBlock", "DescentBlock", "DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "proj_in", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 17,
        patch_size: int = 2,
        num_layers: int = 4,
        num_attention_heads: int = 4,
        attention_head_dim: int = 16,
        ista_step_size: float = 0.1,
        ista_lambda: float = 0.1,
        block_type: str = "descent",
        condition_sizes: tuple[int, ...] = (),
        condition_dropout: float = 0.1,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        make_block = {
            "white_box": lambda: WhiteBoxDiTBlock(dim, num_attention_heads, ista_step_size, ista_lambda),
            "descent": lambda: DescentBlock(dim, num_attention_heads),
            "dit": lambda: DiTBlock(dim, num_attention_heads),
        }
        if block_type not in make_block:
            raise ValueError(f"`block_type` must be one of {', '.join(make_block)}, not {block_type!r}.")
        self.num_tokens = num_patches = math.ceil(sample_size / patch_size)
        per_token = block_type == "descent"
        self.proj_in = TokenLinear(num_patches, patch_size, dim) if per_token else nn.Linear(patch_size, dim)
        # The authors' 2-D table of width 1: half of it, for the column, is constant (sin 0 and cos 0).
        places = torch.zeros(num_patches), torch.arange(num_patches)
        table = [get_1d_sincos_pos_embed_from_grid(dim // 2, place, output_type="pt") for place in places]
        self.register_buffer("pos_embed", torch.cat(table, dim=1).float()[None])  # (1, patches, hidden)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, dim)
        # One more category than given: the last one is the null label.
        self.condition_embedders = nn.ModuleList(nn.Embedding(size + 1, dim) for size in condition_sizes)
        self.blocks = nn.ModuleList(make_block[block_type]() for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = TokenLinear(num_patches, dim, patch_size) if per_token else nn.Linear(dim, patch_size)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self):
        """Xavier-uniform projections and zero biases; modulations and the output projection start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # adaLN-Zero: blocks with residuals start as the identity, and the output starts at zero.
        for linear in [block.modulation for block in self.blocks] + [self.modulation_out, self.proj_out]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _embed_conditions(
        self, class_labels: torch.Tensor | None, batch_size: int, device: torch.device
    ) -> torch.Tensor:
        """The sum of the label embeddings, (batch, hidden)."""
        sizes = self.config.condition_sizes  # the null label of a label key is its number of categories
        labels = torch.tensor(sizes, device=device).expand(batch_size, -1) if class_labels is None else class_labels
        columns = labels.reshape(batch_size, -1).unbind(1)
        if len(columns) != len(sizes):
            raise ValueError(
                f"`class_labels` has {len(columns)} labels per cell, but the model has {len(sizes)} label keys"
                f" (condition_sizes={tuple(sizes)})."
            )
        if self.training and self.config.condition_dropout > 0:
            all_keys, one_key = torch.rand(2, batch_size, device=device) < self.config.condition_dropout
            chosen = torch.randint(len(sizes), (batch_size,), device=device)
            dropped = [all_keys | (one_key & (chosen == key) & (len(sizes) > 1)) for key in range(len(sizes))]
            columns = [torch.where(drop, size, labels) for drop, size, labels in zip(dropped, sizes, columns)]
        return sum(embedder(labels) for embedder, labels in zip(self.condition_embedders, columns))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        label_index: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, sample_size)`): Noisy latents.
            timestep (`torch.Tensor` of shape `(batch,)`, or one number for the whole batch): Diffusion timestep.
            class_labels (`torch.LongTensor` of shape `(batch, num_label_keys)` or `(batch,)`, *optional*):
                Category of each cell in each label key. The null label, one past the last category, means that the
                label is unknown. `None` means that all labels are.
            return_dict (`bool`, defaults to `True`): Whether to return a [`Transformer2DModelOutput`], not a tuple.
            label_index (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Row of `class_labels` for each cell; requires one timestep for the whole batch. Cells that are sampled
                together have few combinations of labels, and modulations are computed once per combination.

        Returns `sample`, of the shape of `hidden_states`, in a [`Transformer2DModelOutput`] or a tuple.
        """
        batch_size, sample_size = hidden_states.shape
        if sample_size != self.config.sample_size:
            raise ValueError(
                f"`hidden_states` has {sample_size} values per cell, but the model has {self.config.sample_size}."
            )
        if class_labels is not None and not self.config.condition_sizes:
            raise ValueError("`class_labels` were given to an unconditional model (condition_sizes=()).")

        # 1. Tokens: patches of consecutive values
        patch_size = self.config.patch_size
        hidden_states = F.pad(hidden_states, (0, self.num_tokens * patch_size - sample_size))
        hidden_states = hidden_states.unflatten(1, (self.num_tokens, patch_size))  # (batch, patches, patch_size)
        hidden_states = self.proj_in(hidden_states)  # (batch, patches, hidden)
        hidden_states = hidden_states + self.pos_embed.to(hidden_states.dtype)

        # 2. Timestep and conditions: a timestep that all cells share is embedded once
        timestep = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1)  # (batch or 1,)
        temb = self.time_embedder(self.time_proj(timestep).to(hidden_states.dtype))  # (batch or 1, hidden)
        if self.config.condition_sizes:
            num_labels = batch_size if label_index is None or class_labels is None else len(class_labels)
            conditions = self._embed_conditions(class_labels, num_labels, temb.device)
            temb = temb + conditions  # (batch or combinations, hidden)
        temb = F.silu(temb)

        # 3. Blocks
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, label_index)
            else:
                hidden_states = block(hidden_states, temb, label_index)

        # 4. Back to values
        shift, scale = per_cell(self.modulation_out(temb), label_index).chunk(2, dim=-1)
        hidden_states = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        sample = hidden_states.flatten(1)[:, :sample_size]  # (batch, sample_size)

        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
