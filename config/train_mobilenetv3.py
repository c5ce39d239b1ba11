# The largest network of once-for-all's space, 7,664,760 parameters, on ImageNet for 180 epochs:
# where progressive shrinking starts (config/shrink_mobilenetv3.py).
# torchrun --standalone --nproc_per_node=8 train.py config/train_mobilenetv3.py
include('base_mobilenetv3.py')
space = 'mobilenetv3'
out_dir = 'out/train_mobilenetv3'
depth = 4
kernel_size = 7
expand = 6
resolutions = [128, 144, 160, 176, 192, 208, 224] # published: every fourth number between
