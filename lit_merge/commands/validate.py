"""Evaluate on the validation split.

Examples:
  lit-merge validate --data.task digits
  lit-merge validate --data.task digits --model.task_vector runs/digits/task_vector.safetensors
  lit-merge validate --data.task digits --ckpt_path last --output runs/digits

Settings that are changed most:
  --output FOLDER             where validate_metrics.json is written, by default runs/validate/TIME
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

from lit_merge.commands.training import validate

__all__ = ["validate"]
