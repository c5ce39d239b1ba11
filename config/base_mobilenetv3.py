# Trains a network of once-for-all's space on ImageNet from scratch, by the recipe of its largest one.
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_mobilenetv3.py --arch=out/search_mobilenetv3_drnas/arch.json
out_dir = 'out/base_mobilenetv3'
dataset = 'imagenet'
batch_size = 64
gradient_accumulation_steps = 32 # 2,048 images a step
val_portion = 0.0079
max_iters = 111700
eval_interval = 3103
eval_iters = 150
bn_batches = 32 # 2,048 images
flip = True
resized_crop = 0.08
color_jitter = 0.125 # published: brightness 32/255, saturation 0.5
label_smoothing = 0.1
weight_optimizer = 'sgd'
nesterov = True
learning_rate = 0.96
min_lr = 0.0
weight_decay = 3e-5
warmup_iters = 3103
grad_clip = 0.0
