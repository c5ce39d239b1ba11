# Trains a network of once-for-all's space on ImageNet from scratch, 180 epochs.
# torchrun --standalone --nproc_per_node=8 train_base.py config/base_mobilenetv3.py --arch=out/search_mobilenetv3_drnas/arch.json
include('shared/mobilenetv3_imagenet.py')
out_dir = 'out/base_mobilenetv3'
val_portion = 0.0079 # what the search keeps for itself
max_iters = 111700
eval_interval = 3103
learning_rate = 0.96 # 3e-2 a GPU of 32
