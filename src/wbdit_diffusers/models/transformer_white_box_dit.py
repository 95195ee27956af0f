"""White-Box Diffusion Transformer (arXiv 2411.06785) and, as its baseline, the plain DiT block (arXiv 2212.09748).

A cell's latents are cut into patches of consecutive values; every patch is a token. Each block does two steps of one
objective, the sparse rate reduction of CRATE (arXiv 2306.01129): attention compresses the tokens against learned
subspaces `U`, ISTA sparsifies them in a learned dictionary `D`. There are two such blocks. `WhiteBoxDiTBlock` is the
published one, whose steps training is free to turn elsewhere; `DescentBlock` can only take steps that descend.
"""

import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from .convert_original import convert_original_checkpoint
from .loading import CheckedModel, check_number, check_transformer


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str | None, parallel_config: object | None
) -> torch.Tensor:
    """Scaled dot-product attention of `(batch, tokens, heads, head_dim)`."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and backend is None:
        # Here the fused attention is slower than its products written out, above all backwards.
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (batch, heads, tokens, tokens)
        return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)
    return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config)


class MSSAProcessor:
    """One projection `w = U x` is query, key and value at once: `softmax(w wᵀ / sqrt(head_dim)) w` per head."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "MSSA", hidden_states: torch.Tensor) -> torch.Tensor:
        w = attn.to_w(hidden_states).unflatten(-1, (attn.heads, -1))  # (batch, tokens, heads, head_dim)
        hidden_states = attend(w, w, w, self._attention_backend, self._parallel_config)
        return attn.to_out(hidden_states.flatten(2))  # (batch, tokens, hidden)


class MSSA(nn.Module, AttentionModuleMixin):
    """Multi-head subspace self-attention (CRATE, arXiv 2306.01129, section 2.3; arXiv 2411.06785, "MSSA").

    The rows of `to_w.weight` are the bases `U_h` of `heads` subspaces. A step of MSSA moves the tokens down the
    gradient of their coding rate in those subspaces. `to_out` is learned freely, as in the authors' code: the theory
    would tie it to `U`.
    """

    _default_processor_cls = MSSAProcessor
    _available_processors = [MSSAProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_w = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.set_processor(MSSAProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class SelfAttentionProcessor:
    """Scaled dot-product attention with separate query, key and value, from one matrix product."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SelfAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = attn.qkv(hidden_states).unflatten(-1, (3, attn.heads, -1))  # (batch, tokens, 3, heads, head_dim)
        query, key, value = qkv.unbind(2)
        hidden_states = attend(query, key, value, self._attention_backend, self._parallel_config)
        return attn.to_out(hidden_states.flatten(2))  # (batch, tokens, hidden)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """The DiT block's attention."""

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.set_processor(SelfAttentionProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class ISTA(nn.Module):
    """One step of the iterative shrinkage-thresholding algorithm for a non-negative LASSO in the dictionary `D`.

    `relu(x + η(Dᵀx - DᵀDx) - ηλ)` (CRATE, arXiv 2306.01129, section 2.4). Written as `Dᵀ(x - Dx)`
    it needs two matrix products instead of three.
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


def largest_eigenvalue(matrix: torch.Tensor) -> torch.Tensor:
    """A bound from above of the largest eigenvalue of `AᵀA`: the 16-norm of all of them, which needs no iteration."""
    gram = matrix.t().float() @ matrix.float()
    scale = gram.norm()  # no eigenvalue is larger: their powers stay finite
    power = gram / scale
    for _ in range(3):
        power = power @ power
    return scale * power.norm() ** (1 / 8)


class ContractionProcessor:
    """Each token moves towards what attention makes of all, within each subspace: `softmax(w wᵀ / sqrt(p)) w - w`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "Contraction", hidden_states: torch.Tensor) -> torch.Tensor:
        w = F.linear(hidden_states, attn.subspaces).unflatten(-1, (attn.heads, -1))  # (batch, tokens, heads, head_dim)
        step = attend(w, w, w, self._attention_backend, self._parallel_config) - w
        lift = attn.subspaces.t() / largest_eigenvalue(attn.subspaces).to(w.dtype)
        return F.linear(step.flatten(2), lift)  # (batch, tokens, hidden)


class Contraction(nn.Module, AttentionModuleMixin):
    """The step of MSSA as it is derived: `Uᵀ(softmax(w wᵀ / sqrt(p)) w - w) / ‖U‖²` with `w = U x`.

    Descent of the coding rate (CRATE, arXiv 2306.01129, equation 11) takes from each token what it alone has in a
    subspace. [`MSSA`] leaves out the `- w`, and learns a matrix of its own in the place of `Uᵀ`: its steps, once
    trained, raise the coding rate (docs/white_box.md). Divided by ‖U‖², as ISTA's step is by ‖D‖², no step overshoots.
    """

    _default_processor_cls = ContractionProcessor
    _available_processors = [ContractionProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.subspaces = nn.Parameter(torch.empty(dim, dim))  # U, the bases of all heads in rows
        nn.init.orthogonal_(self.subspaces)
        self.set_processor(ContractionProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class BoundedISTA(nn.Module):
    """One step of ISTA that can't miss, `relu(a + η Dᵀ(x - Da) - ηλ)` from the code `a = relu(x)`.

    With `η ≤ 1 / ‖D‖²` it lowers `½‖x - Da‖² + λ‖a‖₁` (Beck and Teboulle 2009, lemma 2.3), in which λ is learned.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dictionary = nn.Parameter(torch.empty(dim, dim))  # D
        nn.init.orthogonal_(self.dictionary)
        self.log_lambda = nn.Parameter(torch.tensor(math.log(0.1)))

    @property
    def lambd(self) -> torch.Tensor:
        """λ, the weight of sparsity; above zero."""
        return self.log_lambda.exp()

    @property
    def step_size(self) -> torch.Tensor:
        """η, at most 1 / ‖D‖²."""
        return 1 / largest_eigenvalue(self.dictionary)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        step_size, code = self.step_size.to(hidden_states.dtype), F.relu(hidden_states)  # a
        residual = hidden_states - F.linear(code, self.dictionary)  # x - Da
        gradient = F.linear(residual, self.dictionary.t())  # Dᵀ(x - Da)
        return F.relu(code + step_size * gradient - step_size * self.lambd)


class AdaLNZeroBlock(nn.Module):
    """`x + gate₁·attn(mod(LN x))`, then `x + gate₂·ff(mod(LN x))`, every shift, scale and gate from `temb`.

    The residual around the second half is not in CRATE: the token stream itself is not sparse, only the branch is.
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
        modulation = self.modulation(temb)  # (batch, 1 or combinations, 6 * hidden)
        if label_index is not None:
            modulation = modulation[label_index]
        modulation = modulation[:, None]  # (batch or 1, 1, 6 * hidden)
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

    Timestep and labels add a vector to all tokens, and say how far to go, between not at all (0) and all the way (1):
    gates for each channel, or of either sign, would turn the steps. It is the tokens that take them, not a branch
    beside. That ISTA's step descends is a theorem, that attention's does was measured (docs/white_box.md).
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
        modulation = self.modulation(temb)  # (batch, 1 or combinations, hidden + 2)
        if label_index is not None:
            modulation = modulation[label_index]
        shift, gates = modulation[:, None].split([hidden_states.shape[-1], 2], dim=-1)
        gate_attn, gate_ff = torch.sigmoid(gates - 1).chunk(2, dim=-1)  # (batch or 1, 1, 1) each

        hidden_states = self.norm(hidden_states + shift)
        hidden_states = hidden_states + gate_attn * self.attn(hidden_states)
        return hidden_states + gate_ff * (self.ff(hidden_states) - hidden_states)  # (batch, tokens, hidden)


class DiTBlock(AdaLNZeroBlock):
    """Self-attention, and an MLP four times as wide inside (arXiv 2212.09748): the baseline of every comparison."""

    def __init__(self, dim: int, heads: int):
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU("tanh"), "fc2": nn.Linear(4 * dim, dim)}
        super().__init__(dim, attn=SelfAttention(dim, heads), ff=nn.Sequential(OrderedDict(layers)))


class TokenLinear(nn.Module):
    """A linear map of its own for each token, `(batch, tokens, in_features)` to `(batch, tokens, out_features)`."""

    def __init__(self, num_tokens: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(num_tokens, out_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bni,nio->bno", hidden_states, self.weight) + self.bias


class WhiteBoxDiTModel(CheckedModel, AttentionMixin, ConfigMixin):
    r"""
    Predicts the noise (or the velocity, as the scheduler's `prediction_type` says) in a batch of noisy cells.

    The defaults are the shape of arXiv 2411.06785: 17,926,666 parameters at 2,000 genes and depth 3, against
    33,870,346 with `block_type="dit"`.

    Args:
        sample_size (`int`):
            Values per cell, the codec's `num_features`: with a [`ProgramCodec`] the programs and the library size,
            with an [`ExpressionCodec`] the genes (and the library size). Need not be a multiple of `patch_size`.
        patch_size (`int`, defaults to 10): Consecutive values that make one token.
        num_layers (`int`, defaults to 3): Number of blocks.
        num_attention_heads (`int`, defaults to 8): Number of heads, i.e. of subspaces.
        attention_head_dim (`int`, defaults to 96):
            Dimension of a subspace. The hidden size is `num_attention_heads * attention_head_dim`, and must be a
            multiple of 4.
        ista_step_size (`float`, defaults to 0.1): η of the ISTA step.
        ista_lambda (`float`, defaults to 0.1): λ, the weight of the ISTA step's sparsity.
        block_type (`str`, defaults to `"white_box"`):
            `"white_box"` ([`WhiteBoxDiTBlock`], as published), `"descent"` ([`DescentBlock`], whose steps descend, and
            each token has projections of its own) or `"dit"` ([`DiTBlock`], self-attention and MLP).
        condition_sizes (`tuple[int]`, defaults to `()`):
            Number of categories of each label key that conditions the cells. Empty: unconditional.
        condition_dropout (`float`, defaults to 0.1):
            Probability, while training, that a cell's labels are all replaced by the null label: what
            classifier-free guidance needs.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["WhiteBoxDiTBlock", "DescentBlock", "DiTBlock"]
    _repeated_blocks = ["WhiteBoxDiTBlock", "DescentBlock", "DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "proj_in", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        patch_size: int = 10,
        num_layers: int = 3,
        num_attention_heads: int = 8,
        attention_head_dim: int = 96,
        ista_step_size: float = 0.1,
        ista_lambda: float = 0.1,
        block_type: str = "white_box",
        condition_sizes: tuple[int, ...] = (),
        condition_dropout: float = 0.1,
    ):
        super().__init__()
        sizes = (sample_size, patch_size, num_layers, num_attention_heads, attention_head_dim, condition_sizes)
        check_transformer(*sizes, block_type)
        for name, value in (("ista_step_size", ista_step_size), ("ista_lambda", ista_lambda)):
            check_number(name, value, 0, 1000)
        check_number("condition_dropout", condition_dropout, 0, 1)
        dim = num_attention_heads * attention_head_dim
        make_block = {
            "white_box": lambda: WhiteBoxDiTBlock(dim, num_attention_heads, ista_step_size, ista_lambda),
            "descent": lambda: DescentBlock(dim, num_attention_heads),
            "dit": lambda: DiTBlock(dim, num_attention_heads),
        }[block_type]
        num_patches = math.ceil(sample_size / patch_size)
        named = block_type == "descent"  # tokens have projections of their own
        self.proj_in = TokenLinear(num_patches, patch_size, dim) if named else nn.Linear(patch_size, dim)
        self.register_buffer("pos_embed", self._position_embedding(num_patches, dim))
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, dim)
        # One category more than given: the last is the null label.
        self.condition_embedders = nn.ModuleList(nn.Embedding(size + 1, dim) for size in condition_sizes)
        self.blocks = nn.ModuleList(make_block() for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = TokenLinear(num_patches, dim, patch_size) if named else nn.Linear(dim, patch_size)
        self.gradient_checkpointing = False
        self._init_weights()

    @property
    def num_tokens(self) -> int:
        """Tokens of one cell."""
        return self.pos_embed.shape[1]

    @staticmethod
    def _position_embedding(num_patches: int, dim: int) -> torch.Tensor:
        # The authors use a 2-D table of width 1, so the half for the column is constant: sin 0 and cos 0.
        row = get_1d_sincos_pos_embed_from_grid(dim // 2, torch.arange(num_patches), output_type="pt")
        column = get_1d_sincos_pos_embed_from_grid(dim // 2, torch.zeros(num_patches), output_type="pt")
        return torch.cat([column, row], dim=1).float()[None]  # (1, patches, hidden)

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # adaLN-Zero: a block with residuals starts as the identity, and the network's output as zero.
        for linear in [block.modulation for block in self.blocks] + [self.modulation_out, self.proj_out]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _embed_conditions(
        self, class_labels: torch.Tensor | None, batch_size: int, device: torch.device
    ) -> torch.Tensor:
        """The sum of the label embeddings, (batch, hidden)."""
        # The null label of a label key is its number of categories. It is filled in, not copied from a list: copies
        # make the CPU wait for the GPU.
        sizes = self.config.condition_sizes
        if class_labels is None:
            columns = [torch.full((batch_size,), size, device=device) for size in sizes]
        else:
            columns = class_labels.reshape(batch_size, -1).unbind(1)
        if len(columns) != len(sizes):
            raise ValueError(
                f"`class_labels` has {len(columns)} labels per cell, but the model is conditioned on"
                f" {len(sizes)} label keys (condition_sizes={tuple(sizes)})."
            )
        if self.training and self.config.condition_dropout > 0:
            drop = torch.rand(batch_size, device=device) < self.config.condition_dropout
            columns = [torch.where(drop, size, labels) for size, labels in zip(sizes, columns)]
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
            hidden_states (`torch.Tensor` of shape `(batch, sample_size)`): The noisy cells.
            timestep (`torch.Tensor` of shape `(batch,)`, or one number for the whole batch): Diffusion time.
            class_labels (`torch.LongTensor` of shape `(batch, num_label_keys)` or `(batch,)`, *optional*):
                Category of each cell in each label key. The index one past the last category, and `None`, mean "not
                given".
            return_dict (`bool`, defaults to `True`): Return a [`Transformer2DModelOutput`] instead of a tuple.
            label_index (`torch.LongTensor` of shape `(batch,)`, *optional*):
                The row of `class_labels` that each cell has; `timestep` is then one number. Cells that are sampled
                together share timestep and a few combinations of labels: their modulations are computed once per
                combination instead of once per cell.

        Returns:
            [`Transformer2DModelOutput`], or a tuple: its `sample`, of the shape of `hidden_states`.
        """
        batch_size, sample_size = hidden_states.shape
        if sample_size != self.config.sample_size:
            raise ValueError(
                f"`hidden_states` has {sample_size} values per cell; the model has {self.config.sample_size}."
            )
        if class_labels is not None and not self.config.condition_sizes:
            raise ValueError("`class_labels` were given to an unconditional model (condition_sizes=()).")

        # 1. Tokens: patches of consecutive values
        patch_size, num_patches = self.config.patch_size, self.pos_embed.shape[1]
        hidden_states = F.pad(hidden_states, (0, num_patches * patch_size - sample_size))
        hidden_states = hidden_states.unflatten(1, (num_patches, patch_size))  # (batch, patches, patch_size)
        hidden_states = self.proj_in(hidden_states)  # (batch, patches, hidden)
        hidden_states = hidden_states + self.pos_embed.to(hidden_states.dtype)

        # 2. Timestep and conditions; one timestep for all cells is embedded once
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
        modulation = self.modulation_out(temb)
        if label_index is not None:
            modulation = modulation[label_index]
        shift, scale = modulation[:, None].chunk(2, dim=-1)
        hidden_states = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        sample = hidden_states.flatten(1)[:, :sample_size]  # (batch, sample_size)

        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    @classmethod
    def from_original_checkpoint(cls, path: str | Path, num_attention_heads: int = 8) -> "WhiteBoxDiTModel":
        """
        Converts a checkpoint of the authors' code, White-Box or DiT, of any depth and width.

        Args:
            path (`str` or `Path`):
                A `state_dict` saved by `torch.save`. It is read with `weights_only=True`: a file that holds anything
                but tensors is refused.
            num_attention_heads (`int`, defaults to 8): Cannot be read off the file; 8 in all the authors' models.

        Returns:
            [`WhiteBoxDiTModel`]: in float32, in eval mode, unconditional.

        Raises:
            ValueError: If the file is no tensor checkpoint, or not one of the authors' two networks.
        """
        config, state_dict = convert_original_checkpoint(path, num_attention_heads)
        model = cls(**config)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the {config['block_type']} network: {error}") from error
        return model.eval()
