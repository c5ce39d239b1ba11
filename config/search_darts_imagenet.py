# The DARTS cells on ImageNet itself with the settings of PC-DARTS, but for its edge normalization:
# half of the channels, 6,250 steps of 1,024 images, the alphas from step 4,375 on; 8 GPUs.
# python prepare.py --dataset=imagenet --img_size=224
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_darts_imagenet.py config/darts.py
# Published top-1 error of the retrained cell: 24.2%, after 50 epochs of 10% of the images and 2.5%
# for the alphas; here the same number of steps shows 4 of 5 images.
space = 'darts'
dataset = 'imagenet'
out_dir = 'out/search_darts_imagenet'
init_channels = 16
n_layer = 8
stem = 'imagenet'
partial_channels = 2
affine = False
flip = True
resized_crop = 0.08
batch_size = 128
gradient_accumulation_steps = 8 # 1,024 images a step
train_portion = 0.8
max_iters = 6250
eval_interval = 625
eval_iters = 40
weight_optimizer = 'sgd'
learning_rate = 0.5
min_lr = 0.0
warmup_iters = 625
weight_decay = 3e-4
grad_clip = 5.0
arch_learning_rate = 6e-3
arch_warmup_iters = 4375
