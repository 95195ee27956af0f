"""Your own training loop: gene programs from this package, everything else in PyTorch, Diffusers and Accelerate."""

import sys

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.utils.data import DataLoader, TensorDataset

from wbdit_diffusers import ScRNAGenerationPipeline, WhiteBoxDiTModel
from wbdit_diffusers.data import CellDataset, encode_cells, load_pbmc
from wbdit_diffusers.training import CodecConfig, fit_codec


num_epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
cells = load_pbmc()
config = CodecConfig(label_keys=["cell_type"], num_programs=16, codec_max_steps=400, decoder_steps=200)
processor, codec = fit_codec(cells, config)
dataset = CellDataset(cells, processor)
latents = TensorDataset(encode_cells(dataset, codec), dataset.class_labels)

sizes = {"sample_size": codec.num_features, "condition_sizes": processor.condition_sizes}
denoiser = WhiteBoxDiTModel(**sizes, patch_size=2, num_attention_heads=4, attention_head_dim=16, block_type="descent")
scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
accelerator = Accelerator()
optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
model, optimizer, batches = accelerator.prepare(denoiser, optimizer, DataLoader(latents, 128, shuffle=True))
for epoch in range(num_epochs):
    for clean, class_labels in batches:
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (len(clean),), device=clean.device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        prediction = model(noisy, timesteps, class_labels, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"Epoch {epoch}: loss {loss.item():.3f}")

pipe = ScRNAGenerationPipeline(accelerator.unwrap_model(model).eval().cpu(), scheduler, processor, codec)
pipe(num_cells=100, cell_types="CD19+ B", num_inference_steps=50).cells.write_h5ad("own_cells.h5ad")
