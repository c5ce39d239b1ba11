# Trains DARTS cells on ImageNet by the published recipe: 14 cells of 48 channels behind ImageNet's
# stem, 250 epochs, an auxiliary head, label smoothing. A published cell, or what a search found:
# python prepare.py --dataset=imagenet --img_size=224
# python train_base.py config/base_darts_imagenet.py --space=darts --genotype=DARTS_V2
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_darts_imagenet.py --arch=out/search_darts_imagenet_darts/arch.json --gradient_accumulation_steps=8 --batch_size=16
# Published top-1 errors in %: DARTS_V2 26.7, PC_DARTS_cifar 25.1, PC_DARTS_image 24.2; the last two
# with 1,024 images a step, a learning rate of 0.5 and 5 epochs of warmup.
include('base_darts.py')
dataset = 'imagenet'
out_dir = 'out/base_darts_imagenet'
init_channels = 48
n_layer = 14
stem = 'imagenet'
stem_multiplier = 1
drop_path = 0.0
crop = 0
cutout = 0
resized_crop = 0.08
color_jitter = 0.4 # published: and 0.2 of the hue
label_smoothing = 0.1
batch_size = 128
max_iters = 2502250
eval_interval = 100090 # 10 epochs
learning_rate = 0.1
milestones = [227773 * halving for halving in range(1, 11)] # published: times 0.97 an epoch
weight_decay = 3e-5
