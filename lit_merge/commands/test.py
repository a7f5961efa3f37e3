"""Evaluate on the test split.

Examples:
  lit-merge test --data.task digits
  lit-merge test --data.path my_images --model.task_vector runs/mine/task_vector.safetensors
  lit-merge test --model MultiTaskModule --data MultiTaskDataModule --model.weights merged.safetensors

Settings that are changed most:
  --output FOLDER             where test_metrics.json is written, by default runs/test/TIME
  --overwrite true            replace earlier ones
  --data.task NAME            an embedded task or a published data set (lit-merge data list)
  --data.path PATH            instead, a folder of images, one folder per class, or a file of texts
  --data.batch_size NUMBER    images per step and device
  --model.model NAME          a CLIP: lit-tiny, ViT-B-32, ViT-L-14 …
  --model.pretrained TAG      its weights: a tag, a file, or random
  --model.task_vector FILE    a task vector to add
  --model.weights FILE        instead, whole weights, such as a merge
  --ckpt_path FILE            instead, a checkpoint of a run
  --trainer.devices NUMBER    processes, one per GPU
  --trainer.precision KIND    32-true, bf16-mixed …
  --model CLASS               another module: MultiTaskModule, your.own.Module
  --data CLASS                other data: MultiTaskDataModule, your.own.DataModule
"""

from lit_merge.commands.training import test

__all__ = ["test"]
