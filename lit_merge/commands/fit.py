"""Fine-tune a model on a task (or pre-train); writes its task vector.

Examples:
  lit-merge fit --data.task digits --output runs/digits
  lit-merge fit --config configs/finetune/own_images.yaml --data.path my_images --output runs/mine
  lit-merge fit --config configs/adamerging/layer_wise.yaml --output runs/learned

Settings that are changed most:
  --output FOLDER             run directory, by default runs/fit/TIME
  --overwrite true            replace an earlier run in it
  --ckpt_path FILE            go on from a checkpoint of this run, or from its last one
  --data.task NAME            an embedded task or a published data set (lit-merge data list)
  --data.path PATH            instead, a folder of images, one folder per class, or a file of texts
  --data.batch_size NUMBER    images per step and device
  --model.model NAME          a CLIP: lit-tiny, ViT-B-32, ViT-L-14 …
  --model.pretrained TAG      its weights: a tag, a file, or random
  --model.learning_rate RATE  highest learning rate
  --model.linearized true     train the tangent at the initial weights
  --model.trainable CLASS     what trains: All, Attention, LastBlocks, Matching
  --model.lora.rank RANK      train low-rank factors instead
  --trainer.max_steps NUMBER  length of training (or --trainer.max_epochs)
  --trainer.devices NUMBER    processes, one per GPU
  --trainer.precision KIND    32-true, bf16-mixed …
  --model CLASS               another module: MergeModule, MultiTaskModule, your.own.Module
  --data CLASS                other data: MergeDataModule, MultiTaskDataModule, your.own.DataModule
"""

from lit_merge.commands.training import fit

__all__ = ["fit"]
