# Once-for-all's space on ImageNet as TangleNAS searched it: all choices at once, from scratch,
# 500 epochs and 5 of warmup; 8 GPUs.
# python prepare.py --dataset=imagenet
# torchrun --standalone --nproc_per_node=8 train_search.py config/search_mobilenetv3.py config/drnas.py
include('shared/mobilenetv3_imagenet.py')
space = 'mobilenetv3'
out_dir = 'out/search_mobilenetv3'
batch_size = 256
gradient_accumulation_steps = 8 # 2,048 images a step
train_portion = 0.9922 # 10,000 images for the alphas
max_iters = 313400
eval_interval = 6206
eval_iters = 40
bn_batches = 8 # 2,048 images
resolutions = [128, 144, 160, 176, 192, 208, 224] # published: every fourth number between
learning_rate = 0.24 # 3e-2 a GPU
arch_learning_rate = 3e-4
