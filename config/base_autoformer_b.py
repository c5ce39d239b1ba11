# Trains an architecture of AutoFormer-B on ImageNet at 224 pixels from scratch, 500 epochs of 1,024 images.
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_autoformer_b.py --arch=out/search_autoformer_b_drnas/arch.json
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_autoformer_b.py --space=autoformer --genotype=autoformer_b
out_dir = 'out/base_autoformer_b'
dataset = 'imagenet'
n_embd = [528, 576, 624]
n_layer = [14, 15, 16]
n_head = [9, 10]
mlp_ratio = [3, 3.5, 4]
batch_size = 129 # 43 images, three times each
gradient_accumulation_steps = 8
max_iters = 625500
eval_interval = 6255
val_portion = 0.0
flip = True
resized_crop = 0.08
rand_augment = 9
random_erasing = 0.25
repeated_augmentation = 3
label_smoothing = 0.1
mixup = 0.8
cutmix = 1.0
learning_rate = 1e-3
min_lr = 1e-5
warmup_iters = 25020
weight_decay = 0.05
beta2 = 0.999
grad_clip = 0.0
