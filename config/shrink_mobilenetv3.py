# Once-for-all's progressive shrinking on ImageNet with the published phases of 125, 25, 125, 25
# and 125 epochs, then evolutionary search. It starts from the largest network:
# torchrun --standalone --nproc_per_node=8 train.py config/train_mobilenetv3.py
# torchrun --standalone --nproc_per_node=8 train_search.py config/shrink_mobilenetv3.py
# Published ImageNet top-1 in % of specialised networks, fine-tuned:
# 76.6 (237 M multiply-adds), 79.1 (389 M), 80.0 (595 M).
include('shared/mobilenetv3_imagenet.py')
space = 'mobilenetv3'
out_dir = 'out/shrink_mobilenetv3'
optimizer = 'spos'
inherit = 'out/train_mobilenetv3'
teacher = 'out/train_mobilenetv3'
shrink = ('kernel_size=3 share=125 learning_rate=0.96 subnets_per_step=1, '
          'depth=3 share=25 learning_rate=0.08 subnets_per_step=2 warmup_iters=0, '
          'depth=2 share=125 subnets_per_step=2, '
          'expand=4 share=25 learning_rate=0.08 warmup_iters=0, expand=3 share=125')
subnets_per_step = 4
train_portion = 0.9922 # 10,000 images for the choice
max_iters = 263760
eval_interval = 12412
arch_evals = 1000
population = 100
parents = 25
mutate_prob = 0.1
depth_mutate_prob = 0.1
resolutions = [128, 144, 160, 176, 192, 208, 224] # published: every fourth number between
learning_rate = 0.24 # 7.5e-3 a GPU of 32
