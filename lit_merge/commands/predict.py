"""Write class names and probabilities for images or texts.

Examples:
  lit-merge predict --data.task digits --data.predict_path new_images
  lit-merge predict --data.path my_images --data.predict_path new_images --model.weights merged.safetensors
  lit-merge predict --data.path my_images --data.predict_path a.png --model.task_vector task_vector.safetensors

Settings that are changed most:
  --data.predict_path PATH    an image, a folder of them, or a file of texts
  --output FOLDER             where predictions.csv is written, by default runs/predict/TIME
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

from lit_merge.commands.training import predict

__all__ = ["predict"]
